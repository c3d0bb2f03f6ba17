"""Which kernels a training uses: what they are tried on, and the choice of all ranks."""
