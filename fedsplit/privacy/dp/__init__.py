"""DP-SGD: optimizer and accounting (the only importer of opacus)."""
