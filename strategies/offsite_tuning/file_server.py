"""Hands out files over sessions: an emulator, once to every owner that does not have it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from fedsplit.errors import FedsplitError
from fedsplit.wire.authentication import Hello
from fedsplit.wire.frames import Kind
from fedsplit.wire.link import Link
from fedsplit.wire.transfer import send_files

from ..sessions.owner_session import welcome_header

log = logging.getLogger(__name__)


class FileServer:
    """Sends the same files to whoever is admitted.

    Args:
        files: contents by name.
        digest: of all of them, which owners verify.
        deadline_s: longest wait for an owner's frame.
    """

    def __init__(self, files: Mapping[str, bytes], digest: str, deadline_s: float) -> None:
        self.files = files
        self._digest = digest
        self._deadline = deadline_s
        self._lock = threading.Lock()
        self.sent = 0
        self.bytes_down = 0

    def start(self) -> None:
        """Nothing to begin with."""

    def admit(self, link: Link, hello: Hello) -> None:
        """Serve one owner in a thread of its own."""
        threading.Thread(target=self._serve, args=(link, hello), daemon=True).start()

    def _serve(self, link: Link, hello: Hello) -> None:
        try:
            link.send(Kind.WELCOME, welcome_header(self._digest, "fp32", "fp32"))
            link.expect(Kind.NEED, self._deadline)
            send_files(link, self.files)
            link.send(Kind.BYE, {"reason": "done"})
        except FedsplitError as error:
            log.warning("files for %s: %s: %s", hello.owner, type(error).__name__, error)
            link.fail(error)
            return
        with self._lock:
            self.sent += 1
            self.bytes_down += sum(map(len, self.files.values()))
