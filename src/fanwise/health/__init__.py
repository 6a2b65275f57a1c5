"""Health: error channels in, incidents out."""
