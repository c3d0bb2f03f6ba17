"""Which index: factories measured on a sample, rates of this machine, what a build will need."""
