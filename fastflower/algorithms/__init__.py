"""Composer Algorithms: they change the training state."""
