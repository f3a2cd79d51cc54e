"""Kernel microbenchmarks; run one with ``python -m benchmarks.positive``."""
