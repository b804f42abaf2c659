"""Re-implementations of published attacks, to compare with.

Their losses, steps and searches are their own; the transcript's reader, the soft embeddings of the
public bottom and the scorer are the ones that :mod:`fedsplit.attacks` uses.
"""
