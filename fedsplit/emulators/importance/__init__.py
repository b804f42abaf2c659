"""Importance of blocks (ScaleOT, Dynamic LayerReplace) and harmonizers."""
