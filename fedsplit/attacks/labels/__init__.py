"""Attacks that read private labels."""
