"""fastflower: image-classification contests, from photographs to the hand-in, with Composer and FFCV betons."""

__version__ = "0.1.0"
