"""Bundles: what the server ships to an owner, as bounded, checked files."""
