"""Owners that lie: what they can do to an average, and whether they are named."""
