"""What a machine and a cluster offer: `distlm doctor`."""
