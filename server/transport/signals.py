"""Signals that end a server, where Python's own handlers can't run: in a program of which Python is only a part."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED: Final = 130
"""The exit code after a second signal."""


def block_signals() -> None:
    """Keep them for `wait_for_signals`, in this process and in the program that it becomes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def wait_for_signals(stop: Callable[[], object]) -> None:
    """Call `stop` from another thread at the first signal, those sent since `block_signals` included.

    A second one ends the process at once.
    """

    def wait() -> None:
        signal.sigwait(SIGNALS)
        stop()
        signal.sigwait(SIGNALS)
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, name="signals", daemon=True).start()
