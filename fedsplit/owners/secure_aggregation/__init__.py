"""An owner in masked sums."""
