"""Discovery of a block's projections, by probing."""
