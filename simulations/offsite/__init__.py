"""Experiments on offsite tuning."""
