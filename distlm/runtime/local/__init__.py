"""Copies of files on the node's own disk (launch.stage_in)."""
