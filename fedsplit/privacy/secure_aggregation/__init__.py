"""Secure aggregation: sums of owners' updates of which the server sees no part."""
