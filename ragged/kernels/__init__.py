"""The Triton kernels: `attention`, which begins with Algorithm 1 of the paper, and `rows`. Triton is optional, so they
are imported only where it is used."""
