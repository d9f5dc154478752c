"""Generated sample data: flowers, eyes, digits and pairs of digits."""
