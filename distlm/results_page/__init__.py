"""docs/results.md from the records in results/: `python -m distlm.results_page > docs/results.md`. A test compares.

`python -m distlm.results_page NAME` prints all tables of results/NAME.json, or of the file NAME.
"""
