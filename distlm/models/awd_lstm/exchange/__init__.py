"""AWD-LSTMs that other programs trained."""
