"""The neural cache of Grave et al. (2017)."""
