"""What the tests of REST v2 share: plain HTTP calls with the standard library, request documents, answers as arrays."""

import http.client
import json
from typing import Any, NamedTuple

import numpy as np
from serving import Running

DTYPES = {"FP32": "<f4", "INT64": "<i8", "FP16": "<f2"}


def _no_json(text: str) -> None:
    raise AssertionError(f"the answer has {text}, which is not JSON")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body, parse_constant=_no_json)

    @property
    def error(self) -> str:
        assert set(self.json) == {"error"}
        return self.json["error"]


def call(server: Running, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """One request on a connection of its own; `body` is bytes, chunks of bytes, or a value to send as JSON."""
    if isinstance(body, dict | list):
        body = json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.server.http_port, timeout=60)
    try:
        chunked = body is not None and not isinstance(body, bytes)
        connection.request(method, path, body, headers or {}, encode_chunked=chunked)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def infer(server: Running, model: str, body: Any, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return call(server, "POST", f"/v2/models/{model}/infer", body, named)


def tensor(values: np.ndarray, name: str = "x", datatype: str = "FP32", **fields: Any) -> dict[str, Any]:
    """An input as JSON, flat, or with the `data` or `parameters` given."""
    made = {"name": name, "datatype": datatype, "shape": list(values.shape), **fields}
    if "parameters" not in fields:
        made.setdefault("data", values.ravel().tolist())
    return made


def with_binary(document: dict[str, Any], *tails: bytes) -> tuple[bytes, str]:
    """The body and the header's value for JSON with binary tensors behind it."""
    head = json.dumps(document).encode()
    return b"".join((head, *tails)), str(len(head))


def outputs(answer: Answer) -> dict[str, np.ndarray]:
    """The answer's tensors by name, JSON or binary."""
    assert answer.status == 200, answer.body
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    document, at = json.loads(answer.body[:length]), length
    found = {}
    for output in document["outputs"]:
        dtype, size = DTYPES[output["datatype"]], output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(output["data"], dtype)
        else:
            values, at = np.frombuffer(answer.body[at : at + size], dtype), at + size
            assert "data" not in output
        found[output["name"]] = values.reshape(output["shape"])
    assert at == len(answer.body)
    return found
