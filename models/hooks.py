"""Hooks as a library: the output of any layer inside a model, and the gradients that reach it.

    with FeatureExtractor(model, ["layer1.*@mean", "head"], predictions=False) as extractor:
        features = extractor.run(images).features     # {"layer1.0.relu1@mean": [N, 64], …}

Needs no server. One forward at a time per model: the hooks sit on the model's own modules.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layercast.models.gradients import GradientExtractor
from layercast.models.hook_points import (
    LayerError,
    flatten_output,
    fused_attention_off,
    module_kinds,
    registered_hooks,
    select_modules,
)
from layercast.models.layer_names import LayerName, Pattern, nearest
from layercast.models.reducers import ReducerError, reduce, split_tap
from layercast.models.torch_attention import WEIGHTS, attention_weights

__all__ = [
    "Extraction",
    "FeatureExtractor",
    "GradientExtractor",
    "LayerError",
    "ReducerError",
    "flatten_output",
    "fused_attention_off",
    "registered_hooks",
    "select_modules",
]


class _Stop(BaseException):
    """Ends a forward once everything that was asked for is there; not an Exception, so that no model catches it."""


@dataclass(frozen=True)
class Extraction:
    """What one forward gave: detached features by tap name, and the model's output (None if it was not needed)."""

    features: dict[str, Tensor]
    output: Any
    stopped_early: bool


@dataclass(frozen=True)
class _Tap:
    """One thing asked for: a pattern and its reducers."""

    pattern: Pattern
    reducers: str

    def key(self, name: str) -> str:
        return name if self.reducers == "none" else f"{name}@{self.reducers}"


@dataclass
class _Captures:
    """What one forward has given so far."""

    calls: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    values: dict[tuple[_Tap, LayerName], Tensor] = field(default_factory=dict)
    seen: dict[LayerName, None] = field(default_factory=dict)
    pending: set[LayerName] | None = None


class FeatureExtractor:
    """Context manager that collects layer outputs while it is open and removes its hooks when it closes.

    `layers` are taps, `pattern[@reducer…]`: patterns as in `layer_names.Pattern`, reducers as in `reducers.reduce`.
    Results are keyed by layer name, with `@reducer` where one was asked for.
    `known` is the names of the model's layer index: with it the first early exit is already right; without it the
    extractor learns the order from its first full run.
    `clone` is the names whose tensor a later in-place operation changes; None, the default, copies every value. A
    value that is not copied shares memory with the model's own tensors.
    With `predictions=False`, `run` stops after the deepest executed layer that was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        *,
        known: Iterable[str] | None = None,
        clone: Collection[str] | None = None,
        predictions: bool = True,
    ) -> None:
        if isinstance(layers, str):
            layers = [layers]
        self._model = model
        self._predictions = predictions
        self._clone = clone if clone is None else frozenset(clone)
        self._taps = [_Tap(Pattern(glob), reducers) for glob, reducers in map(split_tap, dict.fromkeys(layers))]
        self._modules = select_modules(model, [tap.pattern for tap in self._taps])
        self._kinds = module_kinds(self._modules)
        # Matching takes longer than a small module, and is the same in every forward.
        self._matches: dict[tuple[LayerName, bool], tuple[_Tap, ...]] = {}
        self._counts: Counter[str] = Counter()
        self._expected: frozenset[LayerName] | None = None
        self._indexed = known is not None
        if known is not None:
            self._learn_from_index(known)
        self._handles: list[RemovableHandle] = []
        self._captures = _Captures()
        self._token_mask: Tensor | None = None

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this FeatureExtractor is already open")
        try:
            for path, module in self._modules.items():
                self._handles.append(module.register_forward_hook(self._hook(path), with_kwargs=True))
            self._handles.append(self._model.register_forward_pre_hook(self._begin))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()

    def release(self) -> None:
        """Let go of the values of the last forward, for an extractor that is kept to be opened again."""
        self._captures = _Captures()

    def run(self, *inputs: Any, token_mask: Tensor | None = None, **named_inputs: Any) -> Extraction:
        """Run the model once and return what was asked for.

        `token_mask` is boolean [N, T], True for tokens that count: reducers leave the others out. LayerError when
        something asked for by name did not run.
        """
        if not self._handles:
            raise RuntimeError("open the FeatureExtractor first: with FeatureExtractor(...) as extractor")
        self._token_mask = token_mask
        pending = None if self._predictions or self._expected is None else set(self._expected)
        self._captures = _Captures(pending=pending)
        output, stopped = None, False
        try:
            with fused_attention_off():
                output = self._model(*inputs, **named_inputs)
        except _Stop:
            stopped = True
        finally:
            self._token_mask = None
            self._captures.pending = None
        selected = list(self._selected())
        self._check_complete({tap for tap, _ in selected})
        if not stopped and not self._indexed:
            self._counts = Counter(self._captures.calls)
            self._expected = frozenset(name for _, name in selected)
        return Extraction(self._named(selected), output if self._predictions else None, stopped)

    @property
    def features(self) -> dict[str, Tensor]:
        """Features of the last forward, also of one that the caller ran through the model itself."""
        return self._named(self._selected())

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if self._captures.calls:  # the caller runs the model directly, again
            self._captures = _Captures()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def collect(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            captures = self._captures
            call = captures.calls[path]
            captures.calls[path] = call + 1
            found = list(flatten_output(output))
            weighted = LayerName(path, call, WEIGHTS)
            if isinstance(module, nn.MultiheadAttention) and self._selecting(weighted, repeated=True):
                weights = attention_weights(module, args, kwargs)
                found += [] if weights is None else [(WEIGHTS, weights)]
            for part, tensor in found:
                name = LayerName(path, call, part)
                captures.seen[name] = None
                # Whether it is called again is not known yet, so any name it may get is accepted here.
                for tap in self._selecting(name, repeated=True):
                    captures.values[tap, name] = self._value(tensor, tap, name)
                if captures.pending is not None:
                    captures.pending.discard(name)
            if captures.pending is not None and not captures.pending:
                raise _Stop

        return collect

    def _value(self, tensor: Tensor, tap: _Tap, name: LayerName) -> Tensor:
        try:
            value = reduce(tensor.detach(), tap.reducers, self._token_mask)
        except ReducerError as error:
            raise ReducerError(f"layer {name.text(repeated=False)}: {error}") from None
        shared = value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return value.clone() if shared and self._must_clone(name) else value

    def _must_clone(self, name: LayerName) -> bool:
        if self._clone is None:
            return True
        return name.text(repeated=False) in self._clone or name.text(repeated=True) in self._clone

    def _repeated(self, path: str) -> bool:
        return self._captures.calls[path] > 1 or self._counts[path] > 1

    def _selected(self) -> Iterator[tuple[_Tap, LayerName]]:
        for tap, name in self._captures.values:
            if tap in self._selecting(name, self._repeated(name.path)):
                yield tap, name

    def _selecting(self, name: LayerName, repeated: bool) -> tuple[_Tap, ...]:
        found = self._matches.get((name, repeated))
        if found is None:
            kind = self._kinds.get(name.path, "")
            found = tuple(tap for tap in self._taps if tap.pattern.selects(name, repeated, kind))
            self._matches[name, repeated] = found
        return found

    def _named(self, selected: Iterable[tuple[_Tap, LayerName]]) -> dict[str, Tensor]:
        values = self._captures.values
        return {tap.key(name.text(self._repeated(name.path))): values[tap, name] for tap, name in selected}

    def _check_complete(self, found: Collection[_Tap]) -> None:
        for tap in self._taps:
            if tap not in found:
                seen = sorted(self._captures.seen, key=lambda name: (name.path, name.call, name.part))
                called = {name.text(self._repeated(name.path)): self._kinds[name.path] for name in seen}
                raise LayerError(
                    f"layer {tap.pattern.text!r} gave no tensor in this forward: it never ran, or it returns none"
                    f"{nearest(tap.pattern.text, called)}"
                )

    def _learn_from_index(self, known: Iterable[str]) -> None:
        names = [(LayerName.parse(text), "#" in text) for text in known]
        for name, repeated in names:
            if repeated:
                self._counts[name.path] = max(self._counts[name.path], name.call + 1)
        self._expected = frozenset(name for name, repeated in names if self._selecting(name, repeated))
        known_taps = {tap for name, repeated in names for tap in self._selecting(name, repeated)}
        for tap in self._taps:
            if tap not in known_taps:
                kinds = module_kinds(dict(self._model.named_modules()))
                layers = {name.text(repeated): kinds.get(name.path, "") for name, repeated in names}
                raise LayerError(f"no layer matches {tap.pattern.text!r}{nearest(tap.pattern.text, layers)}")
