"""Masked language models with product-key memory (Kim & Jung 2020)."""
