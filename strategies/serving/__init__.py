"""Serving a tuned top."""
