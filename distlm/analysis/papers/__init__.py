"""The tables and figures of the papers, from an experiment's folder."""
