"""Child processes: who tells this process to end tells them, and this process ends after them."""

from __future__ import annotations

import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any

ENDING: dict[int, int] = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT}
"""What asks a process to end (`docker stop` and systemd, Ctrl-C, a terminal that closes), and what its child gets."""
if hasattr(signal, "SIGHUP"):  # of which vLLM's server dies at once, and its engine lives on
    ENDING[signal.SIGHUP] = signal.SIGTERM


class Relay:
    """While the block runs, a signal of :data:`ENDING` goes to the child that was started here, and ends nothing here.

    So the block is left in order, and what it has on disk is cleaned up. A signal that is ignored (``nohup``) stays
    ignored. In a thread, which hears no signals, nothing changes.

    Attributes:
        heard: the last signal, 0 while there was none.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Relay:
        if threading.current_thread() is threading.main_thread():
            for each in ENDING:
                if signal.getsignal(each) not in (signal.SIG_IGN, None):
                    self._before[each] = signal.signal(each, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = number
        self._tell()

    def _tell(self) -> None:
        if self._child is not None and self.heard:
            self._child.send_signal(ENDING[self.heard])

    def start(self, command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        """Start the child; settings are those of :class:`subprocess.Popen`.

        Raises:
            OSError: it cannot be started.
        """
        self._child = subprocess.Popen(command, **settings)
        self._tell()  # a signal that came before there was a child
        return self._child

    def run(self, command: list[str]) -> int:
        """Start the child and wait for its end, unless this process was told to end already.

        Returns:
            Its exit status; where a signal ended it, or came before it, 128 + that signal, as a shell has it.

        Raises:
            OSError: it cannot be started.
        """
        if self.heard:
            return 128 + self.heard
        status = self.start(command).wait()
        return status if status >= 0 else 128 - status
