"""Ports that can't be taken: each cause has its own words."""

import errno
import socket

import pytest

from layercast.server.errors import StartError
from layercast.server.settings import read
from layercast.server.transport.ports import bound_socket, not_bound


def refused(host: str, port: int = 0) -> str:
    with pytest.raises(StartError) as raised:
        bound_socket("gRPC", host, port, "--grpc-port").close()
    return str(raised.value)


def test_a_taken_port_is_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"gRPC port {port} on 127.0.0.1 is in use" in refused("127.0.0.1", port)


def test_an_address_of_another_machine_is_said_to_be_one():
    assert "192.0.2.1 is not an address of this machine" in refused("192.0.2.1")


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70, "127.0.0.1:8001x", "a..b"])
def test_an_unknown_host_is_not_a_port_in_use(host):
    text = refused(host)
    assert "in use" not in text
    assert "--host" in text


def test_a_port_that_takes_rights_says_so():
    text = not_bound(PermissionError(errno.EACCES, "Permission denied"), "HTTP", "127.0.0.1", 80, "--http-port")
    assert "HTTP port 80 on 127.0.0.1 may not be taken by this user" in text


def test_an_empty_host_is_refused_since_it_would_mean_every_interface():
    with pytest.raises(StartError, match="host: "):
        read({"host": ""})
