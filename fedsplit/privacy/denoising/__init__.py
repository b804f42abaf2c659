"""Estimates of clean vectors from noisy ones: the server's denoiser, the attacker's decoder."""
