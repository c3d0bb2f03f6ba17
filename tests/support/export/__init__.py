"""Exported folders in tests."""
