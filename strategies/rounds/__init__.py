"""What the rounds of every strategy share: sampling, replies, averaging, lineage, saved state."""
