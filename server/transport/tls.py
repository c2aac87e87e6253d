"""Certificates from files: read and checked once at the start, then in the forms that gRPC and HTTP want."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from layercast.server.errors import StartError


@dataclass(frozen=True)
class Certificates:
    """What encrypts both ports. With a `client_ca`, only callers with a certificate of that authority get in.

    `context` is for HTTP/1, `http2` for the front end of our own; other front ends take what the files hold.
    """

    context: ssl.SSLContext
    http2: ssl.SSLContext
    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Return the credentials for the gRPC port."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], self.client_ca, require_client_auth=self.client_ca is not None
        )


def read_certificates(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Certificates | None:
    """Return the certificates, or None without any; StartError names the setting that is missing or wrong."""
    if certificate is None and key is None:
        if client_ca is not None:
            raise StartError("tls_client_ca: also needs tls_certificate and tls_key, the server's own")
        return None
    if certificate is None or key is None:
        missing, given = ("tls_certificate", "tls_key") if certificate is None else ("tls_key", "tls_certificate")
        raise StartError(f"{missing}: is needed together with {given}")
    certificate_pem, key_pem = _pem(certificate, "tls_certificate"), _pem(key, "tls_key")
    client_ca_pem = _pem(client_ca, "tls_client_ca") if client_ca else None
    context, http2 = (_context(certificate, key, client_ca, client_ca_pem) for _ in range(2))
    http2.set_alpn_protocols(["h2"])
    return Certificates(context, http2, certificate_pem, key_pem, client_ca_pem)


def _context(certificate: Path, key: Path, client_ca: Path | None, client_ca_pem: bytes | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise StartError("tls_key: is not the key of the certificate in tls_certificate") from error
        raise StartError(f"tls_certificate, tls_key: not a PEM certificate and its key ({error.reason})") from error
    if client_ca_pem is not None:
        try:
            context.load_verify_locations(cadata=client_ca_pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise StartError(f"tls_client_ca: {str(client_ca)!r} holds no PEM certificate") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _pem(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{setting}: can't read {str(path)!r}: {error.strerror}") from error


def _no_password() -> str:
    raise StartError("tls_key: is encrypted with a password; give a key without one, in a file that only you can read")
