"""Frozen settings on the evaluated splits: perplexities, intervals, tables."""
