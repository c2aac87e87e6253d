"""What a person writes about a module's inputs: `tokens:int64[2,T<=128]{0..30521}`.

NAME:DTYPE[SIZES]{VALUES}. NAME is the argument of forward. The first size is the batch; of the others, a number is
fixed, a word or ? is dynamic (a word stands for one size in all inputs), and <=MAX bounds it. VALUES is LOW..HIGH,
both included; `LOW..HIGH pad VALUE` for tokens that are padded; `mask` for zeros and ones that tell which tokens count.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError
from torch import Tensor

from layercast.models.examples import Examples
from layercast.models.manifest import DATATYPES, TensorSpec

SYNTAX: Final = "NAME:DTYPE[SIZES]{VALUES}, such as image:float32[2,3,224,224] or tokens:int64[2,T<=128]{0..30521}"

_SPELLINGS: Final = {
    "float": "FP32", "half": "FP16", "double": "FP64", "bfloat16": "BF16", "short": "INT16", "int": "INT32",
    "long": "INT64", "float16": "FP16", "float32": "FP32", "float64": "FP64",
} | {name.lower(): name for name in DATATYPES if name != "BYTES"}  # fmt: skip
"""Torch's, numpy's and the protocol's names of a datatype, in small letters."""

_NUMBER: Final = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_INPUT: Final = re.compile(
    r"\s*(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<dtype>[\w.]+)\s*\[(?P<sizes>[^\[\]]*)\]\s*(?:\{(?P<values>[^{}]*)\})?\s*\Z"
)
_SIZE: Final = re.compile(
    r"\s*(?:(?P<fixed>[1-9]\d*)|(?P<word>[A-Za-z_]\w*|\?|-1)\s*(?:<=\s*(?P<most>[1-9]\d*))?)\s*\Z"
)
_VALUES: Final = re.compile(rf"\s*(?P<low>{_NUMBER}?)\s*\.\.\s*(?P<high>{_NUMBER})\s*(?:pad\s+(?P<pad>[+-]?\d+))?\s*\Z")


class InputFault(ValueError):
    """A description of an input is not in the syntax, or contradicts another; the text quotes it."""


@dataclass(frozen=True)
class _Size:
    """One size besides the batch: a fixed one, or a word ("" for one that has none) with its bound."""

    fixed: int | None
    word: str = ""
    most: int | None = None


def parse_inputs(texts: Sequence[str]) -> tuple[TensorSpec, ...]:
    """Return the inputs that `texts` describe, in their order; InputFault where they are wrong or disagree."""
    parsed = [_parse(text) for text in texts]
    names = [found["name"] for found, _ in parsed]
    for name in names:
        if names.count(name) > 1:
            raise InputFault(f"input {name} is described twice")
    places = _places({found["name"]: sizes for found, sizes in parsed})
    return tuple(_spec(text, found, sizes, places) for text, (found, sizes) in zip(texts, parsed, strict=True))


def concrete_inputs(texts: Sequence[str]) -> dict[str, Tensor]:
    """Return inputs of the sizes that `texts` give, the batch too; InputFault where one is wrong or left open."""
    made: dict[str, Tensor] = {}
    for text, spec in zip(texts, parse_inputs(texts), strict=True):
        batch = text.partition("[")[2].partition("]")[0].split(",")[0].strip()
        if spec.dynamic_dimensions() or not batch.isdecimal():
            raise InputFault(f"{text!r}: want a number for every size, as in tokens:int64[2,128]")
        made |= Examples([spec]).make(int(batch))
    return made


def _parse(text: str) -> tuple[dict[str, str], list[_Size]]:
    found = _INPUT.match(text)
    if found is None:
        raise InputFault(f"{text!r}: want {SYNTAX}")
    batch, *others = found["sizes"].split(",")
    if not _SIZE.match(batch):
        raise InputFault(f"{text!r}: want sizes that begin with the batch, as in [2,3,224,224], got [{found['sizes']}]")
    sizes = []
    for other in others:
        size = _SIZE.match(other)
        if size is None:
            raise InputFault(
                f"{text!r}: {other.strip() or 'nothing'!r} is no size; want a number from 1, a word (T), ?, or a bound "
                f"as in T<=512"
            )
        word = "" if size["word"] in ("?", "-1", None) else size["word"]
        sizes.append(_Size(int(size["fixed"]) if size["fixed"] else None, word, int(size["most"] or 0) or None))
    return found.groupdict(), sizes


def _places(inputs: Mapping[str, Sequence[_Size]]) -> dict[int, int | None]:
    """Return the bound of every dynamic dimension by place; all inputs share the size of one place.

    InputFault for what an export cannot express: one word in two places, two words or bounds in one.
    """
    words: dict[str, int] = {}
    bounds: dict[int, set[int]] = {}
    at: dict[int, str] = {}
    for name, sizes in inputs.items():
        for place, size in enumerate(sizes, start=1):
            if size.fixed is not None:
                continue
            bounds.setdefault(place, set()).update([size.most] if size.most else [])
            if size.word and words.setdefault(size.word, place) != place:
                raise InputFault(f"input {name}: {size.word} stands in two places; a dynamic size can have only one")
            if size.word and at.setdefault(place, size.word) != size.word:
                raise InputFault(
                    f"input {name}: {size.word} and {at[place]} stand in the same place of two inputs, whose sizes "
                    f"must be equal; use one word for both"
                )
    for place, found in bounds.items():
        if len(found) > 1:
            raise InputFault(f"dimension {place} is bounded by {' and by '.join(map(str, sorted(found)))}")
    return {place: next(iter(found), None) for place, found in bounds.items()}


def _spec(text: str, found: Mapping[str, str], sizes: Sequence[_Size], places: Mapping[int, int | None]) -> TensorSpec:
    dynamic = [place for place, size in enumerate(sizes, start=1) if size.fixed is None]
    bounds = {places[place] for place in dynamic}
    if len(bounds) > 1:
        raise InputFault(f"{text!r}: give all dynamic sizes of one input the same bound, or none")
    datatype = _datatype(text, found["dtype"])
    limits, pad = _values(text, found["values"], datatype)
    if pad is not None and len(sizes) != 1:
        raise InputFault(f"{text!r}: only tokens and masks of two dimensions, [batch, T], can be padded; use {{0..1}}")
    try:
        return TensorSpec(
            name=found["name"],
            datatype=datatype,
            shape=(-1, *(-1 if size.fixed is None else size.fixed for size in sizes)),
            range=limits,
            pad=pad,
            max_length=next(iter(bounds), None),
        )
    except ValidationError as error:
        raise InputFault(f"{text!r}: {error.errors()[0]['msg']}") from None


def _datatype(text: str, dtype: str) -> str:
    short = dtype.rpartition(".")[2].lower()
    if short not in _SPELLINGS:
        near = difflib.get_close_matches(short, _SPELLINGS, n=3) or sorted(_SPELLINGS)
        raise InputFault(f"{text!r}: no datatype {dtype!r}; nearest: {', '.join(near)}")
    return _SPELLINGS[short]


def _values(text: str, values: str | None, datatype: str) -> tuple[tuple[float, float] | None, int | None]:
    """Return range and padding value."""
    if values is None:
        return None, None
    if values.strip() == "mask":
        return (0, 1), 0
    found = _VALUES.match(values)
    if found is None or not found["low"]:
        raise InputFault(f"{text!r}: want values {{LOW..HIGH}}, {{LOW..HIGH pad VALUE}} or {{mask}}, got {{{values}}}")
    low, high = float(found["low"]), float(found["high"])
    if low > high:
        raise InputFault(f"{text!r}: values {{{values}}} end before they begin")
    whole = "INT" in datatype
    if whole and not (low.is_integer() and high.is_integer()):
        raise InputFault(f"{text!r}: {datatype} has whole values only, got {{{values}}}")
    pad = None if found["pad"] is None else int(found["pad"])
    if pad is not None and not (whole and low <= pad <= high):
        raise InputFault(f"{text!r}: the padding value must be one of a whole-numbered range, got {{{values}}}")
    return (low, high), pad
