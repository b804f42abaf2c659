"""Attacks on gradients and updates."""
