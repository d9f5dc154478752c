"""Scores: out-of-fold logits, metrics, calibration, ensembles and error analysis."""
