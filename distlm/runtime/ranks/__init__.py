"""Who am I (world), talk to the others (comm), start and share out ranks."""
