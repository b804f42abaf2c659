"""Attacks that read tokens from representations."""
