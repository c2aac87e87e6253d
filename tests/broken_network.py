"""A loopback proxy that passes on so many bytes from the client and then breaks the connection in a chosen way."""

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Break = Literal["close", "reset", "half-close", "stall"]


class Proxy:
    """Listens on `port`. `passed` counts the bytes that came from clients."""

    def __init__(self, target: int, after: int | None, how: Break) -> None:
        self.passed = 0
        self._target = target
        self._after = after
        self._how = how
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Break everything off and wait for the threads."""
        # Shutting down wakes the threads that wait; closing alone does not.
        for sock in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [client, server]
                self._threads.append(threading.Thread(target=self._pass_on, args=(client, server)))
                self._threads[-1].start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """Pass bytes both ways. One thread, so that closing a socket ends its connection at once."""
        left = self._after
        with client, server, contextlib.suppress(OSError), selectors.DefaultSelector() as waiting:
            waiting.register(client, selectors.EVENT_READ)
            waiting.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select():
                    if key.fileobj is server:
                        answer = server.recv(65_536)
                        if not answer:
                            return
                        client.sendall(answer)
                        continue
                    data = client.recv(65_536)[:left]
                    if not data:
                        return
                    left = None if left is None else left - len(data)
                    self.passed += len(data)
                    server.sendall(data)
                    if left == 0 and self._ends(client, server):
                        return
                    if left == 0:
                        waiting.unregister(client)

    def _ends(self, client: socket.socket, server: socket.socket) -> bool:
        """Break the connection; tell whether both sockets are to be closed."""
        if self._how == "half-close":
            server.shutdown(socket.SHUT_WR)
        if self._how == "reset":
            for sock in (client, server):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return self._how in ("close", "reset")


@contextmanager
def proxy(target: int, after: int | None = None, how: Break = "close") -> Iterator[Proxy]:
    """Run a proxy to `target` that breaks each connection `after` so many bytes from the client (None: never)."""
    made = Proxy(target, after, how)
    try:
        yield made
    finally:
        made.close()
