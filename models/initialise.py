"""Weight initialisers by name, applied to the modules of a model by their type.

    initialise(model, "kaiming_normal", seed=0)
    initialise(model, {nn.Conv2d: "kaiming_normal", nn.Linear: initialiser("truncated_normal", std=0.05)})

Xavier: Glorot and Bengio 2010. Kaiming: He et al. 2015 (arXiv:1502.01852).
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
from torch import Generator, Tensor, nn
from torch.nn import init

from layercast.models.layers.basic import Linear

Initialiser = Callable[[Tensor, Generator | None], object]
"""Fills a tensor in place, drawing from the generator, or from torch's global one when it is None."""

MATRIX_TYPES: Final[tuple[type[nn.Module], ...]] = (
    Linear,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
)
"""Types that a scheme of one name is applied to: those whose weight is a matrix or a kernel, not a scale."""

_Options = dict[str, float | str]
_RANDOM: Final[dict[str, tuple[Callable[..., Tensor], _Options]]] = {
    "xavier_uniform": (init.xavier_uniform_, {"gain": 1.0}),
    "xavier_normal": (init.xavier_normal_, {"gain": 1.0}),
    "kaiming_uniform": (init.kaiming_uniform_, {"a": 0.0, "mode": "fan_in", "nonlinearity": "leaky_relu"}),
    "kaiming_normal": (init.kaiming_normal_, {"a": 0.0, "mode": "fan_in", "nonlinearity": "leaky_relu"}),
    "normal": (init.normal_, {"mean": 0.0, "std": 0.01}),
    "truncated_normal": (init.trunc_normal_, {"mean": 0.0, "std": 0.02, "a": -2.0, "b": 2.0}),
}
"""torch's function and its options with our defaults."""
_FIXED: Final[dict[str, _Options]] = {"zeros": {"val": 0.0}, "ones": {"val": 1.0}, "constant": {}}


def names() -> list[str]:
    """Return the known initialiser names, sorted."""
    return sorted((*_RANDOM, *_FIXED))


def initialiser(name: str, **options: float | str) -> Initialiser:
    """Return the initialiser called `name`; the options are those of torch's function, for instance ``std=0.05``.

    Kaiming fits a ReLU by default (a LeakyReLU with slope `a` = 0). The bounds `a` and `b` of truncated_normal are
    absolute, as torch's are: its default ±2 lies 100 standard deviations away. `constant` needs ``val``.
    Raises ValueError for an unknown name (with the nearest) or option, a missing one, and impossible values.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"unknown initialiser {name!r}{hint} Known: {', '.join(names())}")
    function, defaults = _RANDOM.get(name, (init.constant_, _FIXED.get(name, {})))
    known = {"constant": {"val"}, "zeros": set(), "ones": set()}.get(name, set(defaults))
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{name}: unknown option {unknown[0]!r}; known: {', '.join(sorted(known)) or 'none'}")
    if name == "constant" and not options:
        raise ValueError("constant: val is missing; say initialiser('constant', val=0.1)")
    chosen = {**defaults, **options}
    if name == "truncated_normal" and float(chosen["a"]) >= float(chosen["b"]):
        raise ValueError(f"truncated_normal: a ({chosen['a']}) must be below b ({chosen['b']})")
    if float(chosen.get("std", 0.0)) < 0:
        raise ValueError(f"{name}: std must be at least 0, got {chosen['std']}")

    def fill(tensor: Tensor, generator: Generator | None) -> None:
        function(tensor, **chosen) if name in _FIXED else function(tensor, **chosen, generator=generator)

    return fill


def initialise(
    model: nn.Module,
    scheme: str | Initialiser | Mapping[type[nn.Module], str | Initialiser],
    *,
    bias: str | Initialiser = "zeros",
    seed: int | None = None,
) -> nn.Module:
    """Fill the parameters of `model` in place, and return it.

    A scheme of one name goes to the modules of MATRIX_TYPES; a mapping goes by type, the most specific one where
    several match. Modules of other types keep what they have. `bias` fills the parameters called bias of those
    modules. A shared parameter is filled once, the padding row of an embedding stays zero, frozen parameters are
    filled as well. With a `seed` the values are the same on every device and torch's global generator is untouched.

    Raises ValueError when nothing matches, and where a rule can't fill a parameter (Xavier on a vector), by its path.
    """
    rules = scheme if isinstance(scheme, Mapping) else dict.fromkeys(MATRIX_TYPES, scheme)
    chosen = {kind: initialiser(rule) if isinstance(rule, str) else rule for kind, rule in rules.items()}
    fill_bias = initialiser(bias) if isinstance(bias, str) else bias
    generator = None if seed is None else Generator().manual_seed(seed)
    seen: set[int] = set()
    for path, module, fill_weight in _matching(model, chosen):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_bias = name == "bias" or name.endswith("_bias")
            _fill(parameter, fill_bias if is_bias else fill_weight, generator, f"{path}.{name}".lstrip("."))
        _zero_padding_row(module)
    if not seen:
        raise ValueError(
            f"no parameter initialised: {type(model).__name__} has no module with parameters of type "
            + ", ".join(sorted(kind.__name__ for kind in chosen))
        )
    return model


def _matching(
    model: nn.Module, rules: Mapping[type[nn.Module], Initialiser]
) -> Iterator[tuple[str, nn.Module, Initialiser]]:
    for path, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind in rules:
                yield path, module, rules[kind]
                break


def _fill(parameter: nn.Parameter, rule: Initialiser, generator: Generator | None, path: str) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(f"{path}: is lazy, without a shape yet; run the model once before")
    # Drawn on the CPU in float32, so that a seed gives the same values whatever the device and dtype.
    values = torch.empty(parameter.shape, dtype=torch.float32)
    try:
        rule(values, generator)
    except ValueError as error:
        raise ValueError(f"{path} {list(parameter.shape)}: {error}") from error
    with torch.no_grad():
        parameter.copy_(values)


@torch.no_grad()
def _zero_padding_row(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
        module.weight[module.padding_idx].zero_()
