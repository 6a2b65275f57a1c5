"""Encoded records out: JSON lines, programs, webhooks."""
