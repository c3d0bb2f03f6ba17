"""What `peers.py` compares: a comparison is a file with `turns`, and a line in `turn.py`."""
