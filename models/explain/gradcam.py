"""Grad-CAM (Selvaraju et al. 2017)."""

from typing import Final

import torch
from torch import Tensor, nn

from layercast.models.explain.inputs import ExplainError
from layercast.models.explain.subject import Subject
from layercast.models.gradients import GradientExtractor
from layercast.models.hook_points import LayerError
from layercast.models.layer_names import LayerName

_CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MODES: Final = {1: "linear", 2: "bilinear", 3: "trilinear"}


def gradcam(subject: Subject, layer: str | None = None, upsample: bool = True) -> Tensor:
    """Where in a convolutional layer's maps the score comes from, [N, H, W] (or [N, L], [N, D, H, W]), not negative.

    Channels are weighted by the mean of their gradients over space, summed, and negative sums are dropped. `layer` is a
    pattern that selects one layer, by default the convolution that runs last. The map has the size of the input,
    interpolated linearly, or with `upsample` False that of the layer.
    """
    chosen = _choose(subject, layer)

    def cam(rows: Tensor, _: Tensor) -> Tensor:
        with GradientExtractor(subject.model, [chosen]) as extractor:
            subject.gradients(subject.points(rows), rows)
            gradient, activation = extractor.gradients.get(chosen), extractor.activations[chosen]
        if gradient is None:
            raise ExplainError(f"no gradient reaches layer {chosen!r} from the explained output and input")
        weights = gradient.flatten(2).mean(dim=2)
        return torch.einsum("nc,nc...->n...", weights, activation).relu()

    maps = subject.summed(1, cam)
    return _upsampled(subject, maps) if upsample else maps


def _choose(subject: Subject, layer: str | None) -> str:
    """Return the name of the one layer that `layer` selects, or of the last convolution, found on the first row."""
    modules = dict(subject.model.named_modules())
    convolutions = [path for path, module in modules.items() if path and isinstance(module, _CONVOLUTIONS)]
    if layer is None and not convolutions:
        raise ExplainError("Grad-CAM wants a convolutional layer, and the model has none; try integrated-gradients")
    first = torch.zeros(1, dtype=torch.long, device=subject.targets.device)
    with GradientExtractor(subject.model, convolutions if layer is None else [layer]) as extractor:
        subject.gradients(subject.points(first), first)
        found = extractor.activations
    # [N, T, D] of tokens looks like [N, C, L], so a convolution must vouch for three dimensions.
    fitting = [
        name
        for name, value in found.items()
        if value.dim() > 3 or (value.dim() == 3 and isinstance(modules[LayerName.parse(name).path], nn.Conv1d))
    ]
    if layer is None and fitting:
        return fitting[-1]
    if not fitting:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
        raise ExplainError(
            f"Grad-CAM wants a convolutional layer, [N, C, …]: {layer!r} selects {shapes or 'nothing that ran'}; "
            f"convolutions: {', '.join(convolutions) or 'none'}"
        )
    if len(fitting) > 1:
        raise LayerError(f"{layer!r} is ambiguous, Grad-CAM wants one layer; it selects {', '.join(fitting)}")
    return fitting[0]


def _upsampled(subject: Subject, maps: Tensor) -> Tensor:
    shape = subject.inputs.attributed.shape
    size = shape[1:] if subject.is_tokens else shape[2:]
    if len(size) != maps.dim() - 1:
        raise ExplainError(
            f"a map of {list(maps.shape[1:])} can't be brought to the size of the input, {list(shape[1:])}; "
            "ask for it as it is: upsample=False"
        )
    larger = nn.functional.interpolate(maps[:, None], size=list(size), mode=_MODES[len(size)], align_corners=False)
    return subject.without_padding(larger[:, 0])
