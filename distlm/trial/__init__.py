"""A recipe in small: how fast its first stages are on this machine (`distlm plan --measure`)."""
