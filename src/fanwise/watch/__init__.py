"""Watch: change streams. What changed, where, and by whom."""
