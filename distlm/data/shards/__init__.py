"""Rows for masked language models: documents → WordPiece → tar shards of packed rows; reading in training order."""
