"""Protections of private labels, one per file."""
