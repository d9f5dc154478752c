"""fastflower: image-classification contests from photographs to hand-in on Composer and FFCV's betons."""

__version__ = "0.1.0"
