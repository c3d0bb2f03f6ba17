"""The parts, one a module: `run(place)` does the work and gives an Outcome."""
