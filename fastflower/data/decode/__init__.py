"""JPEG bytes to pixels: the C kernel and its Python interface."""
