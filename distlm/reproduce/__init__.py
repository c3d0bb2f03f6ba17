"""`distlm reproduce`: the runs of a paper's table as one command, each a resumable run of its own."""
