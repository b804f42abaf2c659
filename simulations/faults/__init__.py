"""Experiments on faults: processes killed, networks broken, clocks moved."""
