"""Mutants of the sources, each run against the tests that should notice it; see docs/reliability.md."""
