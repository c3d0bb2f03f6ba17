"""Runs of Hugging Face models in tests."""
