"""What `benchmarks/gpu_check.py` is made of: parts, the processes that they run in, what is kept of them."""
