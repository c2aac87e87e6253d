"""The front end `direct` and h2, a client that keeps to every rule and takes nothing that breaks one."""

import random
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator

import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest
from direct import LIVE, OK, UNIMPLEMENTED, floats, still_serves
from h2.settings import SettingCodes, Settings
from h2_frames import call_headers, message
from numeric import asked
from test_server_inference import values_of

from layercast.proto.messages import ModelInferResponse


class Client:
    """h2 over a socket, and what came on each stream."""

    def __init__(self, port: int, settings: dict[int, int]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.local_settings = Settings(client=True, initial_values=settings)
        self.h2.initiate_connection()
        self.bodies: dict[int, bytes] = defaultdict(bytes)
        self.trailers: dict[int, dict[str, str]] = {}
        self.ended: set[int] = set()
        self.unsent: dict[int, bytes] = {}
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def begin(self, name: str, body: bytes) -> int:
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, call_headers(name))
        self.unsent[stream] = body
        return stream

    def send_some(self, rng: random.Random) -> None:
        """Send a piece of each body that is not yet sent."""
        for stream in list(self.unsent):
            most = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            size = min(rng.randint(1, 16_384), most, len(self.unsent[stream]))
            piece, rest = self.unsent[stream][:size], self.unsent[stream][size:]
            if piece or not rest:
                self.h2.send_data(
                    stream, piece, end_stream=not rest, pad_length=rng.choice([None, 0, 9]) if most > 20_000 else None
                )
                self.unsent[stream] = rest
                if not rest:
                    del self.unsent[stream]
        self.flush()

    def receive(self) -> None:
        data = self.socket.recv(65_536)
        assert data, "closed"
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.DataReceived():
                    self.bodies[event.stream_id] += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                    self.trailers[event.stream_id] = dict(event.headers)
                case h2.events.StreamEnded():
                    self.ended.add(event.stream_id)
                case h2.events.StreamReset():
                    assert event.error_code == 0
                    self.unsent.pop(event.stream_id, None)
                case h2.events.ConnectionTerminated():
                    raise AssertionError(event)
        self.flush()

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.receive()


@pytest.fixture
def client(direct) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(**settings: int) -> Client:
        made.append(Client(direct.server.grpc_port, {SettingCodes[name]: value for name, value in settings.items()}))
        return made[-1]

    yield make
    for each in made:
        each.socket.close()
    still_serves(direct)


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"INITIAL_WINDOW_SIZE": 100}, {"INITIAL_WINDOW_SIZE": 2**31 - 1, "MAX_FRAME_SIZE": 1 << 20},
        {"HEADER_TABLE_SIZE": 0}, {"ENABLE_PUSH": 0, "MAX_HEADER_LIST_SIZE": 1 << 14},
    ],
    ids=["plain", "small windows", "large windows", "no table", "others"],
)  # fmt: skip
def test_many_calls_of_all_sizes_at_a_time(client, settings):
    made, rng = client(**settings), random.Random(3)
    asked_for: dict[int, int] = {}
    for _ in range(60):
        count = rng.choice([1, 3, 100, 5000, 40_000])
        asked_for[made.begin("ModelInfer", message(floats(count).SerializeToString()))] = count
    others = {made.begin("ServerLive", message(b"")): LIVE for _ in range(20)}
    wrong = [made.begin("/no/rpc", message(b"x" * rng.randint(0, 90_000))) for _ in range(10)]
    while made.unsent:
        made.send_some(rng)
        if made.unsent and rng.random() < 0.5:
            made.until(
                lambda: any(made.h2.local_flow_control_window(stream) > 0 for stream in made.unsent) or not made.unsent
            )
    made.until(lambda: made.ended >= {*asked_for, *others, *wrong})
    for stream, count in asked_for.items():
        assert made.trailers[stream]["grpc-status"] == str(OK)
        answer = ModelInferResponse.FromString(made.bodies[stream][5:])
        assert list(values_of(answer)[0, -2:]) == list(range(count))[-2:] if count > 1 else True
        assert len(values_of(answer)[0]) == count
    assert all(made.bodies[stream] == message(LIVE) for stream in others)
    assert {made.trailers[stream]["grpc-status"] for stream in wrong} == {str(UNIMPLEMENTED)}


def test_settings_that_change_all_the_time(client):
    made, rng = client(), random.Random(4)
    streams = []
    for number in range(60):
        streams.append(made.begin("ModelInfer", message(floats(9000).SerializeToString())))
        while made.unsent:
            made.send_some(rng)
        if number % 3 == 0:
            # Not the windows: h2 does not open those of streams that are there.
            table, largest = rng.choice([0, 100, 4096]), rng.choice([16_384, 20_000])
            made.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: table, SettingCodes.MAX_FRAME_SIZE: largest})
            made.flush()
        if rng.random() < 0.5:
            made.receive()
    made.until(lambda: made.ended >= set(streams))
    assert {made.trailers[stream]["grpc-status"] for stream in streams} == {str(OK)}


def test_answers_of_many_frames_and_pings_between_them(client):
    made = client()
    stream = made.begin("ModelInfer", message(asked("wide", np.zeros((3, 1), "f4")).SerializeToString()))
    made.send_some(random.Random(5))
    while stream not in made.ended:
        made.h2.ping(b"pingping")
        made.flush()
        made.receive()
    assert len(made.bodies[stream]) > 3 << 20
