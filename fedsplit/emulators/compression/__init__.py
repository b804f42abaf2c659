"""Parts that compress a block: low-rank and quantised linears, structure copies."""
