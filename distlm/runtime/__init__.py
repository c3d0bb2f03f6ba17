"""What every stage stands on: run directory (rundir), safe files, typed records, locks, signs of life (alive), clean
stops, metrics, progress, what a stage will need (plan); ranks/ and doctor/."""
