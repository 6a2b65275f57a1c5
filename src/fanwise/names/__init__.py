"""Names: where directories are, keyed by file handle, and what the records of a window mean."""
