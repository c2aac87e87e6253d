"""The Embedding that takes a model's token ids: found in a forward, and made to return other values in the next."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from layercast.models.explain.inputs import ExplainError, Inputs
from layercast.models.hook_points import LayerError


@dataclass(frozen=True)
class EmbeddingCall:
    """The call of the Embedding that takes the token ids."""

    module: nn.Embedding
    call: int

    def of(self, token: int, points: Tensor) -> Tensor:
        """Return the embedding of one token id, broadcast to `points` [n, T, D]."""
        if not 0 <= token < self.module.num_embeddings:
            raise ExplainError(f"baseline {token} is no token id; ids are below {self.module.num_embeddings}")
        value: Tensor = self.module(torch.tensor(token, device=points.device))
        return value.detach().expand(points.shape)


def find_embedding(model: nn.Module, inputs: Inputs, row: Tensor) -> tuple[EmbeddingCall, Any]:
    """Run `row` (an index, [1]) and return the first call of an Embedding on its ids, and what the model returned.

    The output of that call is where the forward's gradients start. ExplainError when there is no such call.
    """
    ids = inputs.attributed[row]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise _no_embedding(inputs)
    found: list[EmbeddingCall] = []
    calls: Counter[nn.Module] = Counter()

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        call = calls[module]
        calls[module] += 1
        if found or not args or args[0].shape != ids.shape or not torch.equal(args[0], ids):
            return None
        assert isinstance(module, nn.Embedding)
        found.append(EmbeddingCall(module, call))
        return output.detach().requires_grad_().clone()

    handles = [module.register_forward_hook(hook) for module in embeddings]
    try:
        result = inputs.call(model, row, None)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise _no_embedding(inputs)
    return found[0], result


def _no_embedding(inputs: Inputs) -> ExplainError:
    return ExplainError(
        f"input {inputs.of!r} is {inputs.attributed.dtype}, and no Embedding takes it; "
        "an explanation needs floats (convert them: x.float()) or token ids"
    )


@contextmanager
def replaced(embedding: EmbeddingCall, points: Tensor) -> Iterator[None]:
    """Make the Embedding return `points`, once."""
    calls = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return points if calls == embedding.call + 1 else None

    handle = embedding.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls <= embedding.call:
        raise LayerError("the Embedding that took the first row's token ids did not run for other rows")
