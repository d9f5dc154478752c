"""Conversion from the user's images to betons."""
