"""Floor 1: from labelled photographs to batches."""
