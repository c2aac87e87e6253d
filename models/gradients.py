"""Gradients that reach the outputs of layers, by hooks on the returned tensors."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layercast.models.hook_points import flatten_output, module_kinds, select_modules
from layercast.models.layer_names import LayerName, Pattern


class GradientExtractor:
    """Context manager that keeps layer outputs and the gradients that reach them in a backward pass.

        with GradientExtractor(model, ["layer2.*"]) as gradients:
            model(images)[:, 3].sum().backward()
        gradients.activations["layer2.0"], gradients.gradients["layer2.0"]

    It hooks the returned tensors instead of using full backward hooks: those turn outputs into views, which torch
    forbids to change in place, and so fail on `ReLU(inplace=True)` and `x += skip`. A tensor's hook stays with the
    value that it was registered on, whatever is done to the tensor afterwards. A module that returns its input itself
    (nn.Identity, a Dropout in eval mode) is given a view to return, so that what reaches its input by other ways is not
    counted to it. The values are those of a full backward hook's `grad_output`. Names are those of FeatureExtractor.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self._model = model
        self._patterns = [Pattern(text) for text in ([layers] if isinstance(layers, str) else layers)]
        self._modules = select_modules(model, self._patterns)
        self._kinds = module_kinds(self._modules)
        self._handles: list[RemovableHandle] = []
        self._tensor_handles: list[RemovableHandle] = []
        self._calls: Counter[str] = Counter()
        self._activations: dict[LayerName, Tensor] = {}
        self._gradients: dict[LayerName, Tensor] = {}

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("this GradientExtractor is already open")
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(path)))
        self._handles.append(self._model.register_forward_pre_hook(self._begin))
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook; safe to call twice."""
        _remove(self._handles)
        _remove(self._tensor_handles)

    @property
    def activations(self) -> dict[str, Tensor]:
        """Outputs of the layers in the last forward, as they were when returned; detached."""
        return self._named(self._activations)

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Gradients with respect to those outputs in the last backward; a layer that none reached is absent."""
        return self._named(self._gradients)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        _remove(self._tensor_handles)  # a late backward through an earlier forward must not mix into this one
        self._calls.clear()
        self._activations.clear()
        self._gradients.clear()

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Any], Any]:
        def collect(module: nn.Module, inputs: Any, output: Any) -> Any:
            call = self._calls[path]
            self._calls[path] += 1
            if isinstance(output, Tensor) and output.requires_grad and any(output is given for given in inputs):
                late = self._keep_late(LayerName(path, call, ""), output.detach())
                self._tensor_handles.append(output.register_hook(late))  # type: ignore[no-untyped-call]
                output = output.view_as(output)
            for part, tensor in flatten_output(output):
                name = LayerName(path, call, part)
                if self._selected(name, repeated=True):
                    self._activations[name] = tensor.detach().clone()
                    if tensor.requires_grad:
                        handle: RemovableHandle = tensor.register_hook(self._keep(name))  # type: ignore[no-untyped-call]
                        self._tensor_handles.append(handle)
            return output

        return collect

    def _keep(self, name: LayerName) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            # A copy: autograd may go on to add other paths' gradients into this very tensor.
            self._gradients[name] = gradient.detach().clone()

        return keep

    def _keep_late(self, name: LayerName, alias: Tensor) -> Callable[[Tensor], None]:
        """For a view that is changed in place: autograd then forgets it, and what reaches its base stands for it."""
        version = alias._version

        def keep(gradient: Tensor) -> None:
            if name not in self._gradients and alias._version != version:
                self._gradients[name] = gradient.detach().clone()

        return keep

    def _named(self, values: Mapping[LayerName, Tensor]) -> dict[str, Tensor]:
        named = ((name, self._calls[name.path] > 1, value) for name, value in values.items())
        return {name.text(repeated): value for name, repeated, value in named if self._selected(name, repeated)}

    def _selected(self, name: LayerName, repeated: bool) -> bool:
        return any(pattern.selects(name, repeated, self._kinds[name.path]) for pattern in self._patterns)


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
