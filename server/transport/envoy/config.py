"""Envoy's configuration: one listener on both ports, limits as those of the other front end, and our application."""

from pathlib import Path
from typing import Any, Final

from pyvoy import PyvoyServer

from layercast.server.settings import Settings

ENTRY: Final = "layercast.server.transport.envoy.entry:entry"
"""Our application, as Envoy finds it."""
_BUFFER: Final = 1 << 20  # bytes of a request that wait for Python, and of an answer that wait for its caller

_HTTP: Final[dict[str, Any]] = {
    # By default Envoy ends a stream that was quiet for five minutes, and says who it is.
    "stream_idle_timeout": "0s",
    # By default a caller is who its header x-forwarded-for names, as many callers as it likes.
    "use_remote_address": True,
    "skip_xff_append": True,
    "http_protocol_options": {"accept_http_10": True, "default_host_for_http_10": "layercast"},
    "server_header_transformation": "PASS_THROUGH",
    # In KiB, of a whole request or call, as on the other front end.
    "max_request_headers_kb": 32,
    "http2_protocol_options": {
        "max_concurrent_streams": 1024,
        "initial_stream_window_size": _BUFFER,
        "initial_connection_window_size": 16 * _BUFFER,
        # A header that HTTP does not allow costs its own call, not all those of the connection.
        "override_stream_error_on_invalid_http_message": True,
        "connection_keepalive": {"interval": "60s", "timeout": "20s"},
    },
}


def envoy_config(settings: Settings, addresses: list[tuple[str, int]], entry: str) -> dict[str, Any]:
    """Return the configuration for a listener on `addresses`, encrypted if the settings say so, and the app `entry`.

    There is one listener, since each would have an event loop and a server of its own; HTTP/3, which takes a second
    one, is left out for that reason. There is no administration port.
    """
    (host, port), *others = addresses
    config = PyvoyServer(
        entry,
        address=host,
        port=port,
        tls_cert=_absolute(settings.tls_certificate),
        tls_key=_absolute(settings.tls_key),
        tls_ca_cert=_absolute(settings.tls_client_ca),
        tls_enable_http3=False,
        lifespan=True,
    ).get_envoy_config()
    del config["admin"]
    (listener,) = config["static_resources"]["listeners"]
    # On by default, and then a second server takes part of the traffic of the first, silently.
    listener["enable_reuse_port"] = False
    listener["additional_addresses"] = [
        {"address": {"socket_address": {"address": host, "port_value": port}}} for host, port in others
    ]
    listener["per_connection_buffer_limit_bytes"] = _BUFFER
    listener["filter_chains"][0]["filters"][-1]["typed_config"] |= _HTTP
    return config


def _absolute(path: Path | None) -> Path | None:
    return path and path.absolute()
