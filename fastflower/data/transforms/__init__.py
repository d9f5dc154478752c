"""Transforms of uint8 image batches: augmentation, mixing and test corruptions."""
