"""Datastores of other programs: arrays in memory, and the memory maps of the original kNN-LM."""
