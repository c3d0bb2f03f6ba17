"""Starts the stages of a recipe on a cluster (Slurm by submitit, the deepspeed launcher) and looks after the jobs."""
