"""Attention maps of a model's layers, and attention rollout through them.

with torch.inference_mode(), AttentionExtractor(model) as attention:
    model(tokens)
attention.maps["blocks.0.attn"]                      # [N, H, T, S]
rollout(list(attention.maps.values()), token_mask)   # [N, T, T]
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layercast.models.hook_points import LayerError, flatten_output, fused_attention_off, module_kinds
from layercast.models.layer_names import LayerName, Pattern, nearest
from layercast.models.layers.attention import MultiHeadAttention
from layercast.models.torch_attention import WEIGHTS, attention_weights

_KINDS: Final = (MultiHeadAttention, nn.MultiheadAttention)


class AttentionExtractor:
    """Context manager that collects the attention maps of forwards while it is open; its hooks go when it closes.

    It knows our MultiHeadAttention and torch's (also inside torch's TransformerEncoderLayer, whose fused path it
    switches off while it is open). What the layers return stays as it is: torch's weights are computed a second time,
    beside the forward. `layers` are patterns over the attention modules, as in `layer_names.Pattern`, or over their
    maps as the layer index names them; one that names a part, such as `encoder.layer.*.attention.self[1]`, is over what
    any other module returns. LayerError when one of them matches none.
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str] = "*") -> None:
        # A layer index names the maps (`blocks.0.attn.weights`), this the attention that they are of.
        texts = [layers] if isinstance(layers, str) else layers
        patterns = [Pattern(text.removesuffix(WEIGHTS).removesuffix(".weights")) for text in texts]
        parts = [pattern for pattern in patterns if "[" in pattern.text]
        modules = dict(model.named_modules())
        kinds = module_kinds(modules)
        found = {
            path: module
            for path, module in modules.items()
            if isinstance(module, _KINDS) or (path and any(p.may_select(path, kinds[path]) for p in parts))
        }
        kinds = module_kinds(found)
        for pattern in patterns:
            if not any(pattern.may_select(path, kind) for path, kind in kinds.items()):
                raise LayerError(
                    f"no attention layer matches {pattern.text!r}{nearest(pattern.text, kinds)}"
                    if found
                    else f"{type(model).__name__} has no attention layer: none of its modules is "
                    f"{' or '.join(kind.__module__ + '.' + kind.__qualname__ for kind in _KINDS)}; where another one "
                    "returns attention maps, name them by part, as in encoder.layer.*.attention.self[1]"
                )
        self._model = model
        self._patterns = patterns
        self._kinds = kinds
        self._modules = {
            path: module for path, module in found.items() if any(p.may_select(path, kinds[path]) for p in patterns)
        }
        self._open = ExitStack()
        self._handles: list[RemovableHandle] = []
        self._calls: Counter[str] = Counter()
        self._maps: dict[LayerName, Tensor] = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this AttentionExtractor is already open")
        self._open.enter_context(fused_attention_off())
        self._handles.append(self._model.register_forward_pre_hook(self._begin))
        for path, module in self._modules.items():
            if isinstance(module, MultiHeadAttention):
                self._handles.append(module.weights.register_forward_hook(self._keep_own(path)))
            elif isinstance(module, nn.MultiheadAttention):
                self._handles.append(module.register_forward_hook(self._keep_torchs(path), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._keep_returned(path)))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        self._open.close()

    @property
    def maps(self) -> dict[str, Tensor]:
        """Maps of the last forward by layer name, in order of execution, [N, H, T, S]; detached.

        Rows sum to one over the keys that a query may attend to, masked keys are zero, and a query that may attend to
        nothing has a row of zeros.
        """
        named = ((name, self._calls[name.path] > 1, value) for name, value in self._maps.items())
        return {
            name.text(repeated): value
            for name, repeated, value in named
            if any(pattern.selects(name, repeated, self._kinds[name.path]) for pattern in self._patterns)
        }

    def averaged(self) -> dict[str, Tensor]:
        """The same maps with the mean taken over heads, [N, T, S]."""
        return {name: value.mean(dim=1) for name, value in self.maps.items()}

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._calls.clear()
        self._maps.clear()

    def _keep_own(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, inputs: Any, weights: Tensor) -> None:
            self._keep(path, weights.detach().clone())

        return keep

    def _keep_torchs(self, path: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            weights = attention_weights(module, args, kwargs)
            if weights is None:
                raise LayerError(f"attention layer {path!r} ran without a batch: its query is not [N, T, D]")
            self._keep(path, weights)

        return keep

    def _keep_returned(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            for part, tensor in flatten_output(output):
                name = LayerName(path, self._calls[path], part)
                if any(pattern.selects(name, True, self._kinds[path]) for pattern in self._patterns):
                    self._maps[name] = tensor.detach().clone()
            self._calls[path] += 1

        return keep

    def _keep(self, path: str, weights: Tensor) -> None:
        self._maps[LayerName(path, self._calls[path], "")] = weights
        self._calls[path] += 1


def rollout(maps: Sequence[Tensor], token_mask: Tensor | None = None, residual: float = 0.5) -> Tensor:
    """Return how much each token of the last layer draws on each token of the input, [N, T, T] (Abnar, Zuidema 2020).

    `maps` are [N, H, T, T] (or [N, T, T], averaged already) in order of execution. Each is averaged over heads, mixed
    with the identity for the residual connection (`residual` of it), its rows scaled to sum to one, and multiplied to
    those before. `token_mask` is boolean [N, T], True for a token that counts: rows and columns of the others are zero.
    ValueError for maps that are not of one layer stack.
    """
    if not maps:
        raise ValueError("rollout: want at least one attention map, got none")
    if not 0 <= residual <= 1:
        raise ValueError(f"rollout: residual must be between 0 and 1, got {residual}")
    averaged = [each.mean(dim=1) if each.dim() == 4 else each for each in maps]
    shape = averaged[0].shape
    if len(shape) != 3 or shape[1] != shape[2] or any(each.shape != shape for each in averaged):
        got = ", ".join(str(list(each.shape)) for each in maps)
        raise ValueError(f"rollout: want maps of self-attention of one shape, [N, H, T, T], got {got}; choose layers")
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != shape[:2]):
        raise ValueError(
            f"rollout: token_mask must be boolean {list(shape[:2])}, got {token_mask.dtype} {list(token_mask.shape)}"
        )
    identity = torch.eye(shape[1], dtype=averaged[0].dtype, device=averaged[0].device)
    joined = identity.expand(shape)
    for each in averaged:
        step = residual * identity + (1 - residual) * each
        if token_mask is not None:
            step = step.masked_fill(~token_mask[:, None, :], 0.0)
        total = step.sum(dim=-1, keepdim=True)
        joined = (step / total.clamp(min=torch.finfo(step.dtype).tiny)) @ joined
    return joined if token_mask is None else joined.masked_fill(~(token_mask[:, :, None] & token_mask[:, None]), 0.0)
