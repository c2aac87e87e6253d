"""What is explained: a model on given rows, run from any point between what it was given and a baseline."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layercast.models.explain.embedding import EmbeddingCall, find_embedding, replaced
from layercast.models.explain.inputs import ExplainError, Inputs, checked_targets, pick_output, token_mask_for

Progress = Callable[[int, int], None]
"""Told (rows run, rows to run) after every chunk of a pass over the rows; what it raises ends the explanation."""


@dataclass(frozen=True)
class Budget:
    """How much may run at once: rows in one forward, bytes that autograd keeps for them, evaluations in all."""

    rows: int = 64
    memory_bytes: int = 256 << 20
    evaluations: int | None = None
    progress: Progress = lambda done, total: None

    def __post_init__(self) -> None:
        if self.rows < 1 or self.memory_bytes < 1:
            raise ExplainError(f"chunk_rows and memory_mb must be positive, got {self.rows} and {self.memory_bytes} B")


class Subject:
    """A model in eval mode on N rows, and the score of each row that is explained: the model's output for its target.

    A row's *point* is what attributions are about: the float input itself, or for token ids the output of the first
    Embedding that takes them, [T, D]. `scores` and `gradients` run rows from points of the caller's choice.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        targets: int | Sequence[int] | Tensor | None,
        *,
        output: str | None = None,
        token_mask: Tensor | None = None,
        budget: Budget | None = None,
    ) -> None:
        training = next((path or type(model).__name__ for path, part in model.named_modules() if part.training), None)
        if training is not None:
            raise ExplainError(f"{training} is in training mode, where rows depend on each other; call model.eval()")
        self.model = model
        self.inputs = inputs
        self.budget = budget or Budget()
        self._output = output
        self._embedding: EmbeddingCall | None = None
        self._row_bytes, self._classes = self._probe()
        self.token_mask = token_mask_for(inputs, self._embedding and self._embedding.module, token_mask)
        self.targets = self._largest() if targets is None else self._checked(targets)

    @property
    def rows(self) -> int:
        """Number of rows, N."""
        return self.inputs.rows

    @property
    def is_tokens(self) -> bool:
        """Whether the rows are token ids, explained through their embeddings."""
        return self._embedding is not None

    def points(self, rows: Tensor) -> Tensor:
        """Return the points of `rows` (indices [n]): [n, …] floats, [n, T, D] for tokens. A copy."""
        values = self.inputs.attributed[rows]
        return values if self._embedding is None else self._embedding.module(values).detach()

    def mask_like(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return which values of `points` of `rows` count, boolean, broadcasting over them: all but padding."""
        if self.token_mask is None:
            return torch.ones([1] * points.dim(), dtype=torch.bool, device=points.device)
        mask = self.token_mask[rows]
        return mask.view(*mask.shape, *[1] * (points.dim() - 2))

    def baseline(self, given: float | Tensor | None, points: Tensor, rows: Tensor) -> Tensor:
        """Return the points that stand for nothing there, [n, …]: zeros, a constant, a token id, or a tensor.

        A tensor has the shape of one row or of all of them. Padding keeps its own values, so that it explains nothing.
        """
        if isinstance(given, Tensor):
            whole = given.shape == (self.rows, *points.shape[1:])
            chosen = _like_row(given[rows] if whole else given.expand(1, *given.shape), points)
        elif self._embedding is not None and isinstance(given, int):
            chosen = self._embedding.of(given, points)
        else:
            chosen = torch.tensor(float(given or 0.0), dtype=torch.float64).to(points).expand_as(points)
        return torch.where(self.mask_like(points, rows), chosen, points)

    def scores(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the targets' scores [n] of `rows` run from `points`, which the model may change; no gradients."""
        with torch.no_grad():
            return self._scores(points, rows)

    def gradients(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the gradients [n, …] of the targets' scores with respect to `points`.

        Parameters keep their `grad`. ExplainError where the score does not depend on the input by gradients at all.
        """
        with torch.enable_grad(), self._backward():
            leaf = points.detach().requires_grad_()
            # A copy goes in: the model may change what it is given in place, which a leaf forbids.
            score = self._scores(leaf.clone(), rows)
            if not score.requires_grad:
                raise ExplainError("the output carries no gradient back to the input; occlusion needs none")
            try:
                (gradient,) = torch.autograd.grad(score.sum(), leaf, materialize_grads=True)
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise ExplainError(
                    "the model changes in place what its gradients need; occlusion needs none"
                ) from error
        return gradient

    def chunks(self, items: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows [n], items [n]) until every row has met every one of `items`, as many at once as fit.

        Where they are cut changes nothing but float rounding.
        """
        total, size = self.rows * items, self._chunk_size()
        limit = self.budget.evaluations
        if limit is not None and total > limit:
            raise ExplainError(
                f"{self.rows} rows of {items} evaluations each are {total:,}, at most {limit:,} may be; "
                "send fewer rows, or ask for fewer steps or samples or a larger window"
            )
        device = self.inputs.attributed.device
        for start in range(0, total, size):
            flat = torch.arange(start, min(start + size, total), device=device)
            yield flat % self.rows, flat // self.rows
            self.budget.progress(min(start + size, total), total)

    def summed(self, items: int, contribution: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the sum over `items` of what `contribution(rows [n], items [n])` gives, [n, …], for each of N rows.

        Halves are summed as float32.
        """
        total: Tensor | None = None
        for rows, which in self.chunks(items):
            part = contribution(rows, which)
            if part.is_floating_point():  # a sum of halves would lose what it adds last
                part = part.to(torch.promote_types(part.dtype, torch.float32))
            total = part.new_zeros(self.rows, *part.shape[1:]) if total is None else total
            total.index_add_(0, rows, part)
        assert total is not None  # there is at least one row
        return total

    def fold(self, values: Tensor) -> Tensor:
        """Return attributions [N, …] of all points as those of the input: tokens are summed over their dimensions."""
        return self.without_padding(values.sum(dim=2) if self.is_tokens else values)

    def without_padding(self, values: Tensor) -> Tensor:
        """Return `values` [N, T, …] with zeros at tokens that don't count."""
        if self.token_mask is None:
            return values
        return values.masked_fill(~self.token_mask.view(*self.token_mask.shape, *[1] * (values.dim() - 2)), 0.0)

    def _chunk_size(self) -> int:
        return max(1, min(self.budget.rows, self.budget.memory_bytes // max(self._row_bytes, 1)))

    def _scores(self, points: Tensor, rows: Tensor) -> Tensor:
        outputs = self._run(points, rows)
        return outputs.gather(1, self.targets[rows][:, None]).squeeze(1)

    def _run(self, points: Tensor, rows: Tensor) -> Tensor:
        """Return the output [n, C] of `rows`, run from `points`."""
        if self._embedding is None:
            return pick_output(self.inputs.call(self.model, rows, points), self._output, len(rows))
        with replaced(self._embedding, points):
            return pick_output(self.inputs.call(self.model, rows, None), self._output, len(rows))

    def _backward(self) -> AbstractContextManager[object]:
        """cuDNN's recurrent layers have no backward pass in eval mode; torch's own have."""
        recurrent = any(isinstance(part, nn.RNNBase) for part in self.model.modules())
        return torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()

    def _checked(self, targets: int | Sequence[int] | Tensor) -> Tensor:
        return checked_targets(targets, self.rows, self._classes).to(self.inputs.attributed.device)

    def _largest(self) -> Tensor:
        with torch.no_grad():
            return self.summed(1, lambda rows, _: self._run(self.points(rows), rows).argmax(dim=1))

    def _probe(self) -> tuple[int, int]:
        """Run the first row: find the Embedding of token ids; return the bytes that autograd keeps, and the classes."""
        first = torch.zeros(1, dtype=torch.long, device=self.inputs.attributed.device)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # keeping the tensor itself would tie a knot with the graph that holds it

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if self.inputs.attributed.is_floating_point():
                result = self.inputs.call(self.model, first, self.inputs.attributed[first].requires_grad_().clone())
            else:
                self._embedding, result = find_embedding(self.model, self.inputs, first)
            classes = pick_output(result, self._output, 1).shape[1]
        return sum(kept.values()), classes


def _like_row(given: Tensor, points: Tensor) -> Tensor:
    """Return `given` [n or 1, …] broadcast to `points` [n, …]."""
    try:
        return given.to(points).expand(points.shape)
    except RuntimeError:
        raise ExplainError(
            f"baseline must be like a row, {list(points.shape[1:])}, got {list(given.shape[1:])}"
        ) from None
