"""The experimenter's side: runs on simulated owners, baselines, attacks, benchmarks, reports.

The only importer of ray, and never part of the Flower app bundle.  ``EXPERIMENTS`` is the family's
table: what kinds of experiment a file in ``simulations/configs`` may ask for.
"""
