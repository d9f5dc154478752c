"""Readers of what users give: label files, image files, arrays, folders."""
