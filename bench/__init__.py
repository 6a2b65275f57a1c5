"""Measures fanwise against its peers and against a small C reader: `python -m bench`."""
