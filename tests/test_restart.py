"""A server that is killed and started again under a client that goes on asking."""

import threading
import time

import numpy as np
from test_server_process import FREE, READY, serving
from tiny import ROWS, expected, write

from layercast.client import Client, DeadlineExceeded, Unavailable

PAUSE = 0.05


class Asking:
    """A caller in a thread of its own: whatever happens is an answer that is right, or one of the client's errors."""

    def __init__(self, url: str, right: np.ndarray) -> None:
        self.right = right
        self.answered: list[float] = []
        self.refused: list[float] = []
        self.unexpected: list[BaseException] = []
        self.seen = threading.Condition()
        self._client = Client(url, timeout=5)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._stop.wait(PAUSE):
            try:
                np.testing.assert_allclose(self._client.predict("tiny", ROWS), self.right, atol=1e-4)
                ended = self.answered
            except (Unavailable, DeadlineExceeded):
                ended = self.refused
            except BaseException as error:
                ended = self.refused
                self.unexpected.append(error)
            with self.seen:
                ended.append(time.monotonic())
                self.seen.notify_all()

    def wait_for(self, ends: list[float], count: int) -> float:
        """Return when one more than `count` have ended so, and at what time that was."""
        with self.seen:
            assert self.seen.wait_for(lambda: len(ends) > count or self.unexpected, timeout=30)
            assert not self.unexpected
            return ends[count]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


def test_a_killed_server_is_found_again_within_two_seconds_of_its_return(tmp_path):
    write(tmp_path, 1, seed=1)
    with serving(tmp_path, *FREE) as server:
        ports = server.read_until(READY).groups()
        asking = Asking(f"127.0.0.1:{ports[0]}", expected(1))
        try:
            asking.wait_for(asking.answered, 0)
            refused = len(asking.refused)
            server.popen.kill()
            server.popen.wait()
            asking.wait_for(asking.refused, refused)
            same = ("--grpc-port", ports[0], "--http-port", ports[1], "--metrics-port", ports[2], "--engine", "eager")
            with serving(tmp_path, *same) as again:
                again.read_until(READY)
                back, before = time.monotonic(), len(asking.answered)
                assert asking.wait_for(asking.answered, before) - back < 2 + PAUSE
        finally:
            asking.close()
    assert not asking.unexpected
