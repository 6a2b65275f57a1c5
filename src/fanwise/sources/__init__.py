"""Sources: adapters that turn a kernel channel into records."""
