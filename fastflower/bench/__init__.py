"""Benchmarks: `python -m fastflower.bench <name>`."""
