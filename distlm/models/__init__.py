"""Language models: one wing per kind (transformer, awd_lstm, hf, plm), and what all kinds share.

registry              model.kind → kind; those of other packages by the entry point group distlm.kinds
kind                  what a kind says about itself
described             from a configuration or model.json to the model, whatever its kind
language_model        what every model that predicts the next word offers
io, card, records     model folders: safetensors weights and model.json
complete              markers of whole folders
dropout, row_dropout  dropout, masks, and causal attention
linear_cross_entropy  softmax over a full vocabulary in chunks
empty                 models without memory for their parameters
device                where a rank computes
"""
