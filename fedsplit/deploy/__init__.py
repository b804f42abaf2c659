"""Running between organisations: certificates and keys, and an owner's machine that runs only
what its owner reviewed.

:mod:`~fedsplit.deploy.keys` makes what the parties need to know each other by;
:mod:`~fedsplit.deploy.node` reads an owner's machine file; :mod:`~fedsplit.deploy.checks` says
whether a machine is ready; :mod:`~fedsplit.deploy.start` runs a SuperNode whose every app passes
:mod:`~fedsplit.deploy.guard` first.
"""
