"""Checks of constructor arguments, shared by all layers so that their messages read alike."""

import torch


def recording() -> bool:
    """Return True while a trace or export records operations: a check on sizes would be recorded as a frozen branch."""
    return bool(torch.jit.is_tracing()) or torch.compiler.is_compiling()  # type: ignore[attr-defined,no-untyped-call]


def positive(owner: str, **values: int) -> None:
    """Raise ValueError naming `owner` and the argument unless every value is a whole number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} must be a positive whole number, got {value!r}")


def number(value: object) -> bool:
    """Return whether `value` is a real number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def probability(owner: str, **values: float) -> None:
    """Raise ValueError naming `owner` and the argument unless every value lies in [0, 1)."""
    for name, value in values.items():
        if not number(value) or not 0.0 <= value < 1.0:
            raise ValueError(f"{owner}: {name} must be at least 0 and below 1, got {value!r}")


def divides(owner: str, whole: str, whole_value: int, part: str, part_value: int) -> None:
    """Raise ValueError unless `part_value` divides `whole_value`."""
    if whole_value % part_value:
        raise ValueError(f"{owner}: {whole} ({whole_value}) must be divisible by {part} ({part_value})")
