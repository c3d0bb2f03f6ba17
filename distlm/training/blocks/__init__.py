"""Training in blocks of tokens: what kinds of model that predict the next word share."""
