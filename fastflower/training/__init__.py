"""One training run: from a recipe and the betons of a fold to Composer's Trainer, its record and its resume."""
