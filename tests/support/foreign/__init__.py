"""Tiny models and texts as other programs write them."""
