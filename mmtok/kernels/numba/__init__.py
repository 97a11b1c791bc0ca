"""CPU kernels compiled on first use by numba (extra ``fast``), which needs no compiler; only this folder imports it."""
