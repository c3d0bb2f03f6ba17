"""Who am I (world), talk to the others (comm), stop cleanly (stop), write safely (files), run directory (rundir),
metrics, progress, what a stage will need (plan), environment report (doctor)."""
