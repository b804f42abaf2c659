"""Mechanisms that perturb representations, one per file."""
