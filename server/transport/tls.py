"""Certificates from files: read and checked once at the start, then in the forms that gRPC and HTTP want."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from layercast.server.errors import StartError


@dataclass(frozen=True)
class Certificates:
    """What encrypts both ports. With a `client_ca`, only callers with a certificate of that authority get in."""

    context: ssl.SSLContext
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
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            raise StartError("tls_key: is not the key of the certificate in tls_certificate") from error
        raise StartError(f"tls_certificate, tls_key: not a PEM certificate and its key ({error.reason})") from error
    return Certificates(context, certificate_pem, key_pem, _client_ca(context, client_ca) if client_ca else None)


def _client_ca(context: ssl.SSLContext, path: Path) -> bytes:
    pem = _pem(path, "tls_client_ca")
    try:
        context.load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise StartError(f"tls_client_ca: {str(path)!r} holds no PEM certificate") from error
    context.verify_mode = ssl.CERT_REQUIRED
    return pem


def _pem(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"{setting}: can't read {str(path)!r}: {error.strerror}") from error


def _no_password() -> str:
    raise StartError("tls_key: is encrypted with a password; give a key without one, in a file that only you can read")
