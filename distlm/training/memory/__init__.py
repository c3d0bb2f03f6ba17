"""Training models with product-key memory: what all kinds that can have one share."""
