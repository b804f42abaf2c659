"""Commands of ``fedsplit attack``."""
