"""The tables and figures of the papers, from an experiment's folder.

Each module has `write_tables(root)`, which writes them and gives the tables as text; `PATH`, `TABLES` (CSV → what it is
of) and `NOTES` of its record of results (distlm/analysis/results/); and `rows(root)`, the chief figures beside the
paper's, from these CSV files.
"""
