"""Independent re-implementations of published attacks, at their published settings.

They share nothing with :mod:`fedsplit.attacks` but the files that both read: arrays in, ids out.
"""
