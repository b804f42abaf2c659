"""Observers of a run while it goes on: the progress file, the JSON log, metrics, TensorBoard.

All of it is at the model owner's side and holds only what the server knows anyway.  None of it may
end a run: a full disk costs what would have been shown.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsplit import storage
from fedsplit.config import RunConfig
from fedsplit.errors import ConfigError
from fedsplit.observe import JsonLines, bound, context, writing
from fedsplit.wire.link import Link

from .status import Live
from .tensorboard import EventFile, scalars_of

if TYPE_CHECKING:
    from .metrics import MetricsPort

log = logging.getLogger(__name__)

PAGE = "progress.json"
LOG = "log.jsonl"
EVENTS = "tensorboard"
EVERY_S = 1.0
# What an owner's code logs stays out of the server's log, also where both run in one process, and
# also from threads that its handlers started.
OWNERS_SIDE = ("fedsplit.owners", "fedsplit.client")


class Observers:
    """Observers of one run, as far as the settings ask for them.

    Args:
        config: the run's settings.
        run: Flower's run id.

    Raises:
        ConfigError: a log or event files are asked for, but no ``output.dir`` to put them in, or
            TensorBoard is not installed.
        RunError: the metrics port is taken, or a file cannot be made.
    """

    def __init__(self, config: RunConfig, run: int) -> None:
        output = config.output
        self._folder = Path(output.dir) if output.dir else None
        if self._folder is None and (output.log_json or output.tensorboard):
            raise ConfigError(
                "output.dir='': must name a folder for output.log-json or output.tensorboard"
            )
        self.live = Live(config, run)
        self._wrote = 0.0
        self._writing = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._log: JsonLines | None = None
        self._events: EventFile | None = None
        self.port: MetricsPort | None = None
        with self._stack:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
                if output.log_json:
                    self._log = self._stack.enter_context(self._lines(self._folder / LOG))
                if output.tensorboard:
                    self._events = EventFile(self._folder / EVENTS)
                    self._stack.callback(self._events.close)
            if output.metrics_port:
                from .metrics import MetricsPort, render

                self.port = MetricsPort(output.metrics_port, lambda: render(self.live.page()))
                self._stack.callback(self.port.close)
                log.info("metrics at %s", self.port.url)
            self._stack = self._stack.pop_all()  # all is well: closed by close() alone
        self._note("run", strategy=config.strategy, model=config.model.name)

    def _lines(self, path: Path) -> contextlib.AbstractContextManager[JsonLines]:
        handler = JsonLines(
            path,
            where=lambda: self.live.where,
            keep=_is_servers,
        )
        return writing(handler, ("fedsplit", "strategies", "flwr"))

    def _note(self, event: str, **data: Any) -> None:
        if self._log is not None:
            self._log.note(event, **data)

    def round_started(self, number: int, mode: str, asked: int) -> None:
        """Show that a round's offers go out to ``asked`` owners."""
        self.live.round_started(number, mode, asked)
        self._note("round begins", asked=asked)
        self.show(force=True)

    def session_opened(self, name: str, node: int, link: Link) -> None:
        """Show that an owner's session was accepted."""
        self.live.session_opened(name, node, link)
        with bound(owner=name, node=str(node)):
            self._note("session")
        self.show()

    def step_done(self, values: Mapping[str, Any]) -> None:
        """Show that a cohort step is done; ``values`` are a progress line's."""
        self.live.step_done(values)
        self.show()

    def round_recorded(self, row: Mapping[str, Any]) -> None:
        """Show a round's row of ``server.json``."""
        self.live.round_recorded(row)
        scalars = dict(scalars_of(row))
        self._note("round", number=row.get("round"), **scalars)
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.add(int(row.get("round", 0)), scalars)
        self.show(force=True)

    def results_changed(self, values: Mapping[str, Any]) -> None:
        """Show top-level values of ``server.json`` that were set."""
        self.live.results_changed(values)
        if "status" in values:
            self.show(force=values["status"] != "running")

    def show(self, *, force: bool = False) -> None:
        """Write the progress file, at most once a second unless ``force`` is given."""
        now = time.monotonic()
        if self._folder is None or (now - self._wrote < EVERY_S and not force):
            return
        with self._writing:
            self._wrote = now
            page = self.live.page()
            # Not synced: it shows a run that goes on, and is not what one is resumed from.
            with contextlib.suppress(OSError, ValueError):
                text = json.dumps(page, allow_nan=False, default=str)
                storage.write(self._folder / PAGE, text, durable=False, concurrent=True)
        if self._events is not None and page["steps_per_s"]:
            speed = {"speed/steps_per_s": page["steps_per_s"]}
            with contextlib.suppress(OSError):
                self._events.add(page["steps_done"], speed)

    def close(self) -> None:
        """Write the last page and close everything; harmless when called again."""
        self.show(force=True)
        self._stack.close()
        self._events = self._log = None


def _is_servers(record: logging.LogRecord) -> bool:
    """Return whether a record is the server's own (a simulation runs both sides in one process)."""
    return context().get("side") != "owner" and not record.name.startswith(OWNERS_SIDE)
