"""λ, temperature and k on the first split: grids, adaptive λ, several stores and caches."""
