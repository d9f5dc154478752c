"""Many trainings from one command: folds, seeds, backbones, grids and searches."""
