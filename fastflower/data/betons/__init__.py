"""The beton file format, and the betons of a fold."""
