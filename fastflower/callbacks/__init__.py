"""Composer Callbacks: what reads the State and tells about it: scores, files, events, the console."""
