"""Fingerprints, one per file, and the alignment they share."""
