"""Runs CUDA kernels on the CPU, thread by thread; see README.md."""
