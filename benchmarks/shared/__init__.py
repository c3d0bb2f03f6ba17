"""What the benchmarks share: the command line, clocks, processes, and stores, text and runs that are made up."""
