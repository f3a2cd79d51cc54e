"""What ``scripts/gpu.py`` consists of: commands with limits, in stages, and result files that are always up to date."""
