"""Signed evidence: keys, chained records, public fingerprint files."""
