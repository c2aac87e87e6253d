"""A line that says how far a long job is. Only a terminal sees it."""

import shutil
import sys
import time
from types import TracebackType
from typing import Self, TextIO

_REDRAW_SECONDS = 0.1
_BAR = 24


class Progress:
    """Counts what is done of `total`, of which `known` was done before; drawn on stderr when that is a terminal."""

    def __init__(self, total: int, known: int = 0, stream: TextIO | None = None) -> None:
        self._total, self._known = total, known
        self._stream = sys.stderr if stream is None else stream
        self._shows = self._stream.isatty()
        self._began = time.monotonic()
        self._drawn = 0.0
        self._done = self._failed = 0

    def advance(self, done: int, failed: int = 0) -> None:
        """Count what was done and what failed since the last call."""
        self._done += done
        self._failed += failed
        now = time.monotonic()
        if self._shows and now - self._drawn >= _REDRAW_SECONDS:
            self._drawn = now
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{self.line(now - self._began)[:width]}")
            self._stream.flush()

    def line(self, seconds: float) -> str:
        """The line after so many seconds: bar, count, rate and the time that is left."""
        counted = self._known + self._done + self._failed
        share = counted / self._total if self._total else 1.0
        bar = "#" * int(share * _BAR)
        rate = (self._done + self._failed) / seconds if seconds > 0 else 0.0
        left = _clock((self._total - counted) / rate) if rate else "--:--"
        text = f"[{bar:<{_BAR}}] {share:4.0%}  {counted:,}/{self._total:,}  {rate:,.0f}/s  {left} left"
        return f"{text}  {self._failed:,} unreadable" if self._failed else text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shows:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
