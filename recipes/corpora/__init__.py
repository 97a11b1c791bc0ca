"""The parts of `recipes/bench_corpus.py`: readers to compare with, the calculation on paper, the tables."""
