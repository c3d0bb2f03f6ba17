"""distlm: train and serve memory-augmented language models over many nodes."""

__version__ = "0.1.0"
