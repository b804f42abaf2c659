"""Experiments on split tuning and its privacy."""
