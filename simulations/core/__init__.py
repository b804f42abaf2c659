"""Experiments as such: settings, run folder, cells, report, progress."""
