"""Units of work: how many a stage has, and how the ranks take turns with them."""
