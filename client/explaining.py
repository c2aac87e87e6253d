"""Between `Client.explain` and its messages: options and targets out, the explanation back."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layercast.client.errors import InternalError, InvalidArgument
from layercast.client.types import Explanation, Timing
from layercast.proto import messages
from layercast.proto.codec import decode_named

Targets = int | Sequence[int] | NDArray[np.integer[Any]] | None

_REPEATED = ("window", "stride")


def options_message(options: Mapping[str, Any]) -> messages.ExplainOptions:
    """The options by name as a message; None is the method's default.

    Raises TypeError for an unknown name, as for any argument that a function does not have.
    """
    known = [field.name for field in messages.ExplainOptions.DESCRIPTOR.fields]
    message = messages.ExplainOptions()
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"explain() has no argument {name!r}; {hint}")
        if value is None:
            continue
        try:
            if name in _REPEATED:
                getattr(message, name).extend(np.atleast_1d(value).tolist())
            else:
                setattr(message, name, value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"option {name!r} can't be {value!r}: {error}") from error
    return message


def target_indices(targets: Targets) -> list[int]:
    """One class index for all rows, one for each, or none: each row's largest output."""
    if targets is None:
        return []
    indices = np.atleast_1d(np.asarray(targets))
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        raise InvalidArgument(f"targets are class indices, one for all rows or one for each; got {targets!r}")
    return [int(index) for index in indices]


def explanation_of(response: messages.ExplainResponse) -> Explanation:
    """The answer of the server as arrays. CodecError or InternalError for one that is malformed."""
    (attributions,) = decode_named([response.attributions], kind="output", limit=None).values()
    rows = len(attributions) if attributions.ndim else 0
    if len(response.targets) != rows or len(response.delta) not in (0, rows):
        raise InternalError(
            f"the answer of model {response.model_name!r} is malformed: {rows} rows, {len(response.targets)} targets, "
            f"{len(response.delta)} deltas"
        )
    timing = response.timing
    return Explanation(
        attributions=attributions,
        targets=np.array(response.targets, np.int64),
        delta=np.array(response.delta, np.float64) if response.delta else None,
        timing=Timing(timing.queue_ns / 1e9, timing.compute_ns / 1e9, timing.batch_rows),
        version=response.model_version,
        warning=response.warning,
    )
