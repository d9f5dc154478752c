"""From the user's images to training batches."""
