"""An inference answer as an HTTP body: JSON, with the bytes of binary outputs behind it; compressed when accepted."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from layercast.proto.codec import Place, from_bytes, quoted
from layercast.proto.messages import ModelInferResponse
from layercast.server.errors import InvalidArgument, ResourceExhausted
from layercast.server.rest.documents import dumped, has_json_form, listed
from layercast.server.rest.messages import parameters_of
from layercast.server.rest.requests import Forms

_WORTH_COMPRESSING = 1 << 10
_WINDOW_BITS = {"gzip": 31, "deflate": 15}
_NEVER = re.compile(r"q=0(\.0*)?")


@dataclass
class Body:
    """Bytes of an answer with the headers that belong to them."""

    content: bytes
    headers: dict[str, str] = field(default_factory=dict)


def write_answer(response: ModelInferResponse, forms: Forms, limit: int, encoding: str) -> Body:
    """Return the body for an answer whose outputs are raw; `encoding` is "gzip", "deflate" or "".

    Raises ResourceExhausted when the JSON would have more than `limit` bytes, InvalidArgument for an output that JSON
    can't carry.
    """
    head = bytearray()
    for piece in _json(response, forms):
        head += piece
        if len(head) > limit:
            raise ResourceExhausted(
                f"the answer has more than {limit:,} bytes of JSON; ask for binary data, or send fewer rows"
            )
    tail = [
        raw
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        if forms.binary(output.name)
    ]
    if not tail:
        return _compressed(Body(bytes(head), {"content-type": "application/json"}), encoding)
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return _compressed(Body(b"".join((head, *tail)), headers), encoding)


def accepted_encoding(header: str) -> str:
    """Return the compression to use for an `Accept-Encoding`: gzip before deflate, "" when neither is named."""
    accepted = {}
    for entry in header.lower().split(","):
        name, *options = (part.strip() for part in entry.split(";"))
        accepted[name] = not any(_NEVER.fullmatch(option) for option in options)
    return next((name for name in _WINDOW_BITS if accepted.get(name)), "")


def _json(response: ModelInferResponse, forms: Forms) -> Iterator[bytes]:
    head: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        head["id"] = response.id
    if response.parameters:
        head["parameters"] = parameters_of(response.parameters)
    yield dumped(head)[:-1] + b',"outputs":['
    for index, output in enumerate(response.outputs):
        raw = response.raw_output_contents[index]
        tensor: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        parameters = parameters_of(output.parameters)
        binary = forms.binary(output.name)
        if binary:
            parameters["binary_data_size"] = len(raw)
        elif not has_json_form(output.datatype):
            raise InvalidArgument(
                f"output {quoted(output.name)} is {output.datatype}, which has no form in JSON; ask for binary_data",
                field="outputs",
            )
        if parameters:
            tensor["parameters"] = parameters
        yield (b"," if index else b"") + dumped(tensor)[:-1]
        if not binary:
            yield b',"data":'
            values = from_bytes(raw, output.datatype, output.shape, Place(f"output {output.name}"))
            yield from listed(values, output.datatype, output.name)
        yield b"}"
    yield b"]}"


def _compressed(body: Body, encoding: str) -> Body:
    body.headers["vary"] = "accept-encoding"
    if not encoding or len(body.content) < _WORTH_COMPRESSING:
        return body
    # Level 1: tensors hardly shrink more at the higher ones, which cost several times as much.
    deflater = zlib.compressobj(1, wbits=_WINDOW_BITS[encoding])
    content = deflater.compress(body.content) + deflater.flush()
    return Body(content, body.headers | {"content-encoding": encoding})
