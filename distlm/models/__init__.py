"""Language models: the Baevski–Auli transformer, the AWD-LSTM, and those of Hugging Face.

language_model        what every model offers
kinds                 model.kind → configuration, class, tap points
adaptive              adaptive input and tied adaptive softmax
dropout               dropout, masks, and causal attention
transformer_lm        the transformer and its tap points
lstm                  an LSTM layer with weight drop
linear_cross_entropy  softmax over a full vocabulary in chunks
awd_lstm              the AWD-LSTM
hf                    any causal language model of Hugging Face
io                    model folders: safetensors weights and model.json
device                where a rank computes
"""
