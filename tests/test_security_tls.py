"""TLS and mutual TLS on both ports: who gets in, who does not, and what a wrong file says at the start."""

import http.client
import logging
import re
import ssl
from contextlib import contextmanager
from types import SimpleNamespace

import grpc
import hosting
import numpy as np
import pytest
import trustme
from serving import running
from test_server_inference import offline, rows_for
from test_server_process import FREE, serving

from layercast.client import AsyncClient, Client
from layercast.client.errors import Unavailable
from layercast.server.errors import StartError
from layercast.server.settings import read
from layercast.server.transport.security import Security


class Files:
    """Certificates on disk: of a server, of a client, of an authority, and of one that nobody trusts."""

    def __init__(self, folder) -> None:
        self.folder = folder
        for name in ("ca", "stranger"):
            authority = trustme.CA()
            authority.cert_pem.write_to_path(folder / f"{name}.pem")
            for owner in ("server", "client"):
                issued = authority.issue_cert("localhost", "127.0.0.1")
                issued.private_key_pem.write_to_path(folder / f"{name}-{owner}.key")
                (folder / f"{name}-{owner}.key").chmod(0o600)
                for number, blob in enumerate(issued.cert_chain_pems):
                    blob.write_to_path(folder / f"{name}-{owner}.crt", append=number > 0)

    def __getitem__(self, name: str) -> str:
        return str(self.folder / name)

    def settings(self, **changed: str) -> dict[str, str]:
        return {"tls_certificate": self["ca-server.crt"], "tls_key": self["ca-server.key"], **changed}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


@contextmanager
def serving_tls(repository, settings: dict[str, str]):
    """A server with these settings; Envoy has certificates from its start, so that it is one of its own."""
    if not hosting.envoy:
        with running(repository, engine="eager", **settings) as server:
            yield server
        return
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    with serving(repository, *FREE, *options) as process:
        ports = process.read_until(r"gRPC 127\.0\.0\.1:(\d+)   https://127\.0\.0\.1:(\d+)")
        yield SimpleNamespace(url=f"127.0.0.1:{ports[1]}", server=SimpleNamespace(http_port=int(ports[2])))


@pytest.fixture(scope="module")
def encrypted(one_model, files):
    with serving_tls(one_model, files.settings()) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(one_model, files):
    with serving_tls(one_model, files.settings(tls_client_ca=files["ca.pem"])) as server:
        yield server


def predicted(server, modules, **options) -> None:
    x = rows_for("shared", 2)
    with Client(server.url, timeout=20, **options) as client:
        np.testing.assert_allclose(client.predict("shared", x), offline(modules["shared"], x), atol=1e-5)


def refused(server, message: str, **options) -> None:
    with Client(server.url, timeout=5, **options) as client, pytest.raises(Unavailable, match=message):
        client.predict("shared", rows_for("shared", 1))


def https(server, files, owner: str = "", ca: str = "ca.pem") -> int:
    context = ssl.create_default_context(cafile=files[ca])
    if owner:
        context.load_cert_chain(files[f"{owner}.crt"], files[f"{owner}.key"])
    connection = http.client.HTTPSConnection("127.0.0.1", server.server.http_port, timeout=20, context=context)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status
    finally:
        connection.close()


async def test_clients_that_trust_the_authority_get_in(encrypted, modules, files):
    predicted(encrypted, modules, ca=files["ca.pem"])
    predicted(encrypted, modules, credentials=grpc.ssl_channel_credentials((files.folder / "ca.pem").read_bytes()))
    x = rows_for("shared", 2)
    async with AsyncClient(encrypted.url, ca=files["ca.pem"]) as client:
        np.testing.assert_allclose(await client.predict("shared", x), offline(modules["shared"], x), atol=1e-5)
    assert https(encrypted, files) == 200


def test_clients_that_do_not_trust_it_or_speak_plainly_stay_out(encrypted, files):
    refused(encrypted, r"certificate is not trusted here; .*--ca", ca=files["stranger.pem"])
    refused(encrypted, "certificate is not trusted here", tls=True)
    refused(encrypted, "closed the connection; it may want TLS")
    with pytest.raises(ssl.SSLCertVerificationError):
        https(encrypted, files, ca="stranger.pem")
    connection = http.client.HTTPConnection("127.0.0.1", encrypted.server.http_port, timeout=20)
    connection.request("GET", "/v2/health/ready")
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        connection.getresponse()
    connection.close()
    assert https(encrypted, files) == 200


def test_a_url_with_https_is_encrypted(encrypted):
    with (
        Client(f"https://{encrypted.url}", timeout=5) as client,
        pytest.raises(Unavailable, match="certificate is not trusted here"),
    ):
        client.predict("shared", rows_for("shared", 1))  # the authority of the test is not one that the system trusts


def test_tls_to_a_plain_port_says_so(one_model, files):
    with running(one_model, engine="eager") as plain:
        refused(plain, "does not speak TLS", ca=files["ca.pem"])


def test_mutual_tls_wants_a_certificate_of_its_authority(mutual, modules, files):
    own = {"certificate": files["ca-client.crt"], "key": files["ca-client.key"]}
    predicted(mutual, modules, ca=files["ca.pem"], **own)
    assert https(mutual, files, "ca-client") == 200
    refused(mutual, "a certificate of its callers", ca=files["ca.pem"])
    strange = {"certificate": files["stranger-client.crt"], "key": files["stranger-client.key"]}
    refused(mutual, "closed the connection", ca=files["ca.pem"], **strange)
    for owner in ("", "stranger-client"):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            https(mutual, files, owner)
    predicted(mutual, modules, ca=files["ca.pem"], **own)


def test_a_certificate_with_the_key_of_another_does_not_connect(mutual, files):
    mixed = {"certificate": files["ca-client.crt"], "key": files["ca-server.key"]}
    refused(mutual, "no call to|no server answers", ca=files["ca.pem"], **mixed)


def test_half_of_a_pair_is_a_mistake_of_the_caller(files):
    for half in ({"certificate": files["ca-client.crt"]}, {"key": files["ca-client.key"]}):
        with pytest.raises(ValueError, match="certificate and key go together"):
            Client("localhost:1", **half)


def test_old_versions_of_tls_are_refused(encrypted, files):
    context = ssl.create_default_context(cafile=files["ca.pem"])
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    connection = http.client.HTTPSConnection("127.0.0.1", encrypted.server.http_port, timeout=20, context=context)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connection.request("GET", "/v2/health/ready")
    connection.close()


def mutated(path) -> bytes:
    """A PEM key with one character of its middle changed."""
    text = bytearray(path.read_bytes())
    at = len(text) // 2
    text[at] = ord("A") if text[at] != ord("A") else ord("B")
    return bytes(text)


def locked(key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    loaded = serialization.load_pem_private_key(key, None)
    return loaded.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tls_key": None}, "tls_key: is needed together with tls_certificate"),
        ({"tls_certificate": None}, "tls_certificate: is needed together with tls_key"),
        ({"tls_certificate": None, "tls_key": None, "tls_client_ca": "ca.pem"}, "tls_client_ca: also needs"),
        ({"tls_key": "ca-client.key"}, "tls_key: is not the key of the certificate in tls_certificate"),
        ({"tls_key": "mutated.key"}, "tls_key: "),
        ({"tls_key": "locked.key"}, "tls_key: is encrypted with a password"),
        ({"tls_key": "none.key"}, "tls_key: can't read .*none.key.*No such file"),
        ({"tls_certificate": "none.crt"}, "tls_certificate: can't read .*none.crt"),
        ({"tls_certificate": "."}, "tls_certificate: can't read .*directory"),
        ({"tls_certificate": "ca-server.key"}, "tls_certificate, tls_key: not a PEM certificate"),
        ({"tls_client_ca": "none.pem"}, "tls_client_ca: can't read"),
        ({"tls_client_ca": "ca-server.key"}, "tls_client_ca: .* holds no PEM certificate"),
    ],
)
def test_a_wrong_file_stops_the_start_and_names_the_setting(files, changed, message):
    key = files.folder / "ca-server.key"
    (files.folder / "mutated.key").write_bytes(mutated(key))
    (files.folder / "locked.key").write_bytes(locked(key.read_bytes()))
    given = {name: files[value] if value else None for name, value in changed.items()}
    with pytest.raises(StartError, match=message):
        Security.read(read(files.settings(**given)))


@pytest.mark.parametrize(
    ("host", "with_tls", "with_ca", "with_tokens", "said"),
    [
        ("127.0.0.1", False, False, False, ""),
        ("localhost", False, False, False, ""),
        ("::1", False, False, False, ""),
        ("0.0.0.0", False, False, False, "unencrypted.*; anyone who reaches"),
        ("0.0.0.0", True, False, False, "0.0.0.0: anyone who reaches"),
        ("0.0.0.0", False, False, True, "unencrypted"),
        ("0.0.0.0", True, True, False, ""),
        ("0.0.0.0", True, False, True, ""),
    ],
)
def test_an_open_server_says_so_in_one_line(files, tmp_path, caplog, host, with_tls, with_ca, with_tokens, said):
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["predict"]\n')
    tokens.chmod(0o600)
    given = files.settings() if with_tls else {}
    given |= {"tls_client_ca": files["ca.pem"]} if with_ca else {}
    given |= {"token_file": str(tokens)} if with_tokens else {}
    with caplog.at_level(logging.WARNING):
        Security.read(read({"host": host, **given}))
    assert [record.levelname for record in caplog.records] == (["WARNING"] if said else [])
    assert re.search(said, caplog.text)


def test_a_secret_that_everyone_can_read_is_named(files, tmp_path, caplog):
    tokens = tmp_path / "tokens.toml"
    tokens.write_text('[[tokens]]\nname = "a"\ntoken = "0123456789abcdef"\nscopes = ["predict"]\n')
    tokens.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        Security.read(read({"token_file": str(tokens)}))
    assert "every user of this machine can read" in caplog.text
    assert "chmod 600" in caplog.text
