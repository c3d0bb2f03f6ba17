"""Plots and the report of a run, derived from results.json, knn.json and metrics.jsonl."""
