"""Numbers out: the Prometheus text format, by HTTP and as a file."""
