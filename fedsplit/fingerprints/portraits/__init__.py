"""Portraits: pictures of a fingerprint."""
