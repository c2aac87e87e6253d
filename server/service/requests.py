"""From a message to checked rows: inputs held against the manifest, outputs and layers resolved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layercast.models.manifest import Manifest, TensorSpec
from layercast.proto.codec import quoted
from layercast.server.errors import InvalidArgument
from layercast.server.layers import MAX_PATTERNS, PREFIX, Asked, check_number, near, resolve
from layercast.server.settings import ModelSettings
from layercast.server.work import Array, Tap


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, in its order: names of outputs, and taps under the names that the answer carries."""

    outputs: tuple[str, ...]
    layers: tuple[Asked, ...]
    order: tuple[str, ...]
    """Names of the answer's tensors, outputs and layers, as asked."""

    @property
    def layers_by_name(self) -> dict[str, Tap]:
        """The layers' taps by the names that the answer carries."""
        return {asked.name: asked.tap for asked in self.layers}

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The layers' taps, none twice."""
        return tuple(dict.fromkeys(asked.tap for asked in self.layers))


def check_inputs(manifest: Manifest, inputs: Mapping[str, Array], datatypes: Mapping[str, str]) -> int:
    """Return the number of rows of `inputs`; InvalidArgument unless they are what the model takes.

    `datatypes` are the protocol's names as the request gave them.
    """
    specs = {spec.name: spec for spec in manifest.inputs}
    for name in inputs:
        if name not in specs:
            raise InvalidArgument(
                f"model {manifest.name!r} has no input {quoted(name)}; {near(name, list(specs))}", field="inputs"
            )
    for name in specs:
        if name not in inputs:
            raise InvalidArgument(
                f"input {name!r} is missing; model {manifest.name!r} takes {', '.join(specs)}", field="inputs"
            )
    for position, (name, array) in enumerate(inputs.items()):
        _check_input(specs[name], array, datatypes[name], f"inputs[{position}]")
    rows = {name: array.shape[0] for name, array in inputs.items()}
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name!r} has {count}" for name, count in rows.items())
        raise InvalidArgument(
            f"every input must have the same number of rows (dimension 0), but {counts}", field="inputs"
        )
    _check_lengths(manifest, inputs)
    return int(next(iter(rows.values())))


def _check_lengths(manifest: Manifest, inputs: Mapping[str, Array]) -> None:
    """Refuse dynamic sizes that differ between inputs: an export ties those of one place to each other."""
    first: dict[int, str] = {}
    for spec in manifest.inputs:
        for place in spec.dynamic_dimensions():
            other = first.setdefault(place, spec.name)
            sizes = inputs[other].shape[place], inputs[spec.name].shape[place]
            if sizes[0] != sizes[1]:
                raise InvalidArgument(
                    f"dimension {place} must be of one size in all inputs, but {other!r} has {sizes[0]} and "
                    f"{spec.name!r} has {sizes[1]}",
                    field="inputs",
                )


def _check_input(spec: TensorSpec, array: Array, datatype: str, field: str) -> None:
    if datatype != spec.datatype:
        raise InvalidArgument(
            f"input {spec.name!r}: want datatype {spec.datatype}, got {quoted(datatype)}; convert the values",
            field=f"{field}.datatype",
        )
    if not _fits(spec.shape, array.shape):
        raise InvalidArgument(
            f"input {spec.name!r}: want shape {list(spec.shape)}, got {list(array.shape)}"
            + _shape_hint(spec.shape, array.shape),
            field=f"{field}.shape",
        )
    longest = max((array.shape[place] for place in spec.dynamic_dimensions()), default=0)
    if spec.max_length is not None and longest > spec.max_length:
        raise InvalidArgument(
            f"input {spec.name!r}: {longest} long, the model takes at most {spec.max_length}; "
            "cut it or send it in parts",
            field=f"{field}.shape",
        )
    if array.size and 0 in array.shape[1:]:
        raise InvalidArgument(f"input {spec.name!r}: a dimension besides the batch is 0", field=f"{field}.shape")
    if array.dtype.kind in "iu" and (outside := _outside(spec, array)):
        raise InvalidArgument(outside, field=field)


def warnings(manifest: Manifest, inputs: Mapping[str, Array]) -> str:
    """Return what a caller should know of checked inputs: floats outside the range that the model was trained on."""
    found = (_outside(spec, inputs[spec.name]) for spec in manifest.inputs if inputs[spec.name].dtype.kind == "f")
    return "; ".join(text for text in found if text)


def _outside(spec: TensorSpec, array: Array) -> str:
    """Return what is wrong with values outside the input's range, or "" when there are none."""
    if spec.range is None or not array.size:
        return ""
    low, high = array.min(), array.max()
    # Written so that NaN, which compares to nothing, counts as outside.
    if low >= spec.range[0] and high <= spec.range[1]:
        return ""
    return f"input {spec.name!r}: want values from {spec.range[0]:g} to {spec.range[1]:g}, got {low:g} to {high:g}"


def _fits(want: Sequence[int], got: Sequence[int]) -> bool:
    return len(want) == len(got) and all(
        w in (-1, g) and (g > 0 or not at) for at, (w, g) in enumerate(zip(want, got, strict=True))
    )


def _shape_hint(want: Sequence[int], got: Sequence[int]) -> str:
    if len(got) == len(want) - 1 and _fits(want[1:], got):
        return "; the first dimension is the batch: add it, as in x[None]"
    if len(got) == len(want):
        wrong = [at for at in range(1, len(want)) if want[at] not in (-1, got[at]) or got[at] == 0]
        return f"; dimension {', '.join(map(str, wrong))} differs (the first, 0, is the batch, -1 any size)"
    return f"; the first dimension is the batch, so {len(want)} dimensions in all"


def resolve_outputs(manifest: Manifest, names: Sequence[str], settings: ModelSettings) -> Wanted:
    """Return what the requested output names mean; none at all means every output of the model.

    `settings` are the model's: they say which layers, in which form and how many may be asked for.
    """
    known = [spec.name for spec in manifest.outputs]
    if not names:
        return Wanted(tuple(known), (), tuple(known))
    if len(names) > MAX_PATTERNS:
        raise InvalidArgument(f"{len(names)} outputs are asked for, at most {MAX_PATTERNS} may be", field="outputs")
    outputs: list[str] = []
    layers: list[Asked] = []
    order: list[str] = []
    for position, name in enumerate(names):
        field = f"outputs[{position}].name"
        if name.startswith(PREFIX):
            taps = resolve(manifest, [name.removeprefix(PREFIX)], field, settings)
            found = [Asked(PREFIX + asked.name, asked.tap) for asked in taps]
            layers += found
            check_number(len(layers), settings, field)
            order += [asked.name for asked in found]
        elif name in known:
            outputs.append(name)
            order.append(name)
        else:
            hint = near(name, known)
            raise InvalidArgument(
                f"unexpected inference output {quoted(name)} for model {manifest.name!r}; {hint}; "
                "a layer is asked for as layer:PATH",
                field=field,
            )
    if len(set(order)) < len(order):
        twice = next(name for name in order if order.count(name) > 1)
        raise InvalidArgument(f"output {twice!r} is asked for twice", field="outputs")
    return Wanted(tuple(outputs), tuple(layers), tuple(order))


def token_length(manifest: Manifest, inputs: Mapping[str, Array]) -> int | None:
    """Return the size of the inputs' dynamic dimension, or None when they have none."""
    return length_in(manifest, {name: array.shape for name, array in inputs.items()})


def length_in(manifest: Manifest, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the size of the dynamic dimension of inputs of these `shapes`, or None when they have none."""
    for spec in manifest.inputs:
        dynamic = spec.dynamic_dimensions()
        if dynamic:
            return shapes[spec.name][dynamic[0]]
    return None


def join(parts: Sequence[Array]) -> Array:
    """Return the rows of a request's parts as one array."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
