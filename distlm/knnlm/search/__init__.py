"""Neighbours of every evaluated token: queries, search, exact re-scoring, files."""
