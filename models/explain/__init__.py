"""Explanations: how much each value of an input counts for a model's answer. Needs no server.

explanation = explain(model, images, "integrated-gradients", targets=3)
explanation.attributions, explanation.delta          # [N, C, H, W], [N]
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from layercast.models.explain.gradcam import gradcam
from layercast.models.explain.inputs import ExplainError, Inputs
from layercast.models.explain.integrated import integrated_gradients
from layercast.models.explain.occlusion import occlusion
from layercast.models.explain.rollout import attention_rollout
from layercast.models.explain.saliency import input_x_gradient, saliency, smoothgrad
from layercast.models.explain.subject import Budget, Progress, Subject
from layercast.models.hook_points import fused_attention_off
from layercast.models.layer_names import nearest

__all__ = ["METHODS", "ExplainError", "Explanation", "explain"]

METHODS: Final[Mapping[str, Callable[..., Tensor | tuple[Tensor, Tensor]]]] = MappingProxyType(
    {
        "saliency": saliency,
        "input-x-gradient": input_x_gradient,
        "smoothgrad": smoothgrad,
        "integrated-gradients": integrated_gradients,
        "gradcam": gradcam,
        "occlusion": occlusion,
        "attention-rollout": attention_rollout,
    }
)
"""The methods by name; a method's keyword arguments are its options."""


@dataclass(frozen=True)
class Explanation:
    """Attributions for each row, and the class index that each row was explained for, int64 [N].

    `attributions` has the shape of the input; [N, T] for token ids, with zeros at padding; [N, H, W] for Grad-CAM. It
    is float64 where the model computes in it, otherwise float32.
    `delta` [N] is the completeness error of integrated gradients: how far the sum of a row's attributions is from the
    difference of its scores at the input and at the baseline. None for other methods.
    """

    attributions: Tensor
    targets: Tensor
    delta: Tensor | None = None


def explain(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    method: str,
    targets: int | Sequence[int] | Tensor | None = None,
    layer: str | None = None,
    *,
    of: str | None = None,
    output: str | None = None,
    token_mask: Tensor | None = None,
    chunk_rows: int = 64,
    memory_mb: int = 256,
    max_evaluations: int | None = None,
    progress: Progress = lambda done, total: None,
    **options: Any,
) -> Explanation:
    """Explain what `model`, in eval mode, answers for each row of `inputs`, by one of METHODS.

    `inputs` are batch first: a tensor, or tensors by position or by name, of which `of` is explained. Token ids are
    explained through the output of the first Embedding that takes them. `targets` is a class index, one for each row,
    or None for each row's largest output; `output` names the output if there are several. `token_mask` is boolean
    [N, T], True for a token that counts; without it the Embedding's padding id does not count. `layer` is Grad-CAM's
    layer, or a pattern over the attention layers of a rollout.

    At most `chunk_rows` rows run at once, fewer where autograd would keep more than about `memory_mb` MiB for them;
    neither changes a result but for float rounding, and no row's result depends on other rows. `max_evaluations`
    refuses work that would run more rows than that. `progress(done, total)`, in rows run, is called after every chunk,
    and may raise to end it.

    The model is left as it was: gradients of parameters, hooks, modes. ExplainError for what can't be explained,
    LayerError for a layer that is not there, both with what would do.
    """
    chosen = METHODS.get(method)
    if chosen is None:
        raise ExplainError(f"unknown method {method!r}{nearest(method, list(METHODS))}; known: {', '.join(METHODS)}")
    if layer is not None:
        options["layer"] = layer
    _check_options(method, chosen, options)
    budget = Budget(chunk_rows, memory_mb << 20, max_evaluations, progress)
    with torch.inference_mode(False), fused_attention_off():
        subject = Subject(model, Inputs(inputs, of), targets, output=output, token_mask=token_mask, budget=budget)
        result = chosen(subject, **options)
    attributions, delta = result if isinstance(result, tuple) else (result, None)
    return Explanation(attributions, subject.targets, delta)


def _check_options(method: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    known = list(inspect.signature(function).parameters)[1:]
    for name in options:
        if name not in known:
            raise ExplainError(
                f"method {method} has no option {name!r}{nearest(name, known)}; it has {', '.join(known) or 'none'}"
            )
