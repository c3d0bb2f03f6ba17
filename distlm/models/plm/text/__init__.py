"""What a masked language model sees of its rows: masks, micro-batches, short pieces."""
