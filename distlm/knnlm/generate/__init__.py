"""Text from a kNN-LM, and the training contexts that its words come from."""
