"""The stages of a recipe as jobs: graph, scripts, submission, what is asked of Slurm."""
