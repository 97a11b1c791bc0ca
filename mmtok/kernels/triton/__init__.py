"""Triton kernels, one file for each public kernel of `mmtok.kernels`; only this folder imports triton."""
