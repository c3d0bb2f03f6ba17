"""Tiny models as other programs write them."""
