"""Offsite tuning at the server."""
