"""Views of metrics.jsonl in other programs' files (train.trackers): made from it, then kept up to date with it."""
