"""Training an index on a sample that all ranks share: the same bytes for any number of ranks and threads."""
