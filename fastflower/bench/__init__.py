"""Benchmarks: `python -m fastflower.bench <name>` compares fastflower with named peers."""
