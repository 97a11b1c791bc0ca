"""The parts of `recipes/bench_kernels.py`: protocol, exact answers, contests, tables."""
