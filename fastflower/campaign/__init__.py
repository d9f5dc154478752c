"""Many trainings at once: grids, searches, folds and seeds, with their results in one table."""
