"""Language models: the Baevski–Auli transformer.

adaptive        adaptive input and tied adaptive softmax
dropout         dropout and causal attention
transformer_lm  the model and its tap points
io              model folders: safetensors weights and model.json
device          where a rank computes
"""
