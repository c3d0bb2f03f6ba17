"""Plots as PNG bytes, drawn without a display."""
