"""Composer Algorithms: what changes the training State, each a pure function first and a thin class second."""
