"""Experiments: start federations, sweep settings, attack and measure them, write reports."""
