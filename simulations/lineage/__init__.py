"""Experiments on lineage fingerprints and the gate."""
