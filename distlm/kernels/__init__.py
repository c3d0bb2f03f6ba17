"""Kernels in Triton for what torch's operations do slowly on GPUs; the version in torch says what each must give.

choice    which of them this process uses
launch    how one is started
bags      weighted sums of rows, and the derivatives of their weights
adam      the gradient of rows and their update, in one pass
slots     the best slots of product keys
softmax   what stands between the products of a linear layer's cross-entropy

Only these import triton, and only when one is used: `choice` decides without it.
"""
