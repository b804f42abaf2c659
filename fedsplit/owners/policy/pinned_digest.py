"""Print the app digest that a policy pins: a process of its own for whoever must stay small.

Which rules a policy may hold is known by modules that load torch; a supervisor that runs for weeks
asks this module and holds none of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedsplit.errors import ConfigError
from fedsplit.owners.policy.rules import Policy

if __name__ == "__main__":
    try:
        print(Policy.load(Path(sys.argv[1])).rules.get("app.digest", ""))
    except ConfigError as error:
        sys.exit(str(error))
