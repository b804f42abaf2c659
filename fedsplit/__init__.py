"""fedsplit: organisations fine-tune one language model; text, labels and weights stay at home.

Importing this package is cheap: neither flwr nor ray is loaded until a module that needs it is.
"""

__version__ = "0.1.0"
