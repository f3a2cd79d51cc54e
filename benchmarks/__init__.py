"""Benchmarks of the operators beside other ways to compute the same; ``python -m benchmarks --help``.

A :class:`~benchmarks.problem.Problem` has inputs, truth and a floor, ``cases`` lists the sizes, ``measure`` checks and
times every contender, ``report`` and ``plots`` show what came out.
"""
