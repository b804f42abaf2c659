"""The lineage gate: verdicts with error rates after each aggregate."""
