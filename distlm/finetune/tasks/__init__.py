"""Tasks that a masked language model is fine-tuned on: their files, their rows of tokens, their metrics."""
