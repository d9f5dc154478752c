"""Composer Callbacks: they read the training state, score, save and report."""
