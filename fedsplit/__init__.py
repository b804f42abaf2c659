"""fedsplit: organisations fine-tune one language model; text, labels and weights stay at home.

Importing this package is cheap: neither flwr nor ray nor torch is loaded until a module that needs
it is.

| package | for |
| --- | --- |
| :mod:`fedsplit.models` | loading a model, splitting it into bottom and top |
| :mod:`fedsplit.data` | texts and labels, divided among owners |
| :mod:`fedsplit.privacy` | mechanisms that protect representations and labels |
| :mod:`fedsplit.attacks` | attacks on what was sent |
| :mod:`fedsplit.emulators` | emulators for offsite tuning |
| :mod:`fedsplit.fingerprints` | lineage of models |
| :mod:`fedsplit.evaluation` | perplexity and multiple choice |
| :mod:`fedsplit.strategies` | Flower strategies and the ServerApp |
| :mod:`fedsplit.client` | the Flower ClientApp of an owner |
| :mod:`fedsplit.owners` | an owner's policy, ledger and steps |
| :mod:`fedsplit.config` | a run's settings |
| :mod:`fedsplit.wire` | frames, codecs and streams between owner and server |

Examples:
    >>> import sys, fedsplit
    >>> fedsplit.__version__
    '0.1.0'
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
