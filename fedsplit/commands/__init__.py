"""One module per command (or group of commands) of ``fedsplit``; each has ``register(app)``.

Heavy libraries are imported inside the commands, so that ``fedsplit --help`` is quick.
"""
