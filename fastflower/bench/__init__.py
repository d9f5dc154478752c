"""Benchmarks: `python -m fastflower.bench <name>` measures fastflower beside named peers."""
