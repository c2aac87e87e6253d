"""Which layers of a loaded model may be asked for: as its settings say, and only such as give their values here."""

import logging
from collections.abc import Callable, Mapping

from layercast.models.layer_names import match_layers
from layercast.models.manifest import LayerSpec, Manifest
from layercast.models.reducers import POOLING, ReducerError, pools, reduced_shape
from layercast.server.engines.base import Inputs
from layercast.server.engines.eager import EagerEngine
from layercast.server.layers import NOT_LISTED, OFF, POOLED_ONLY
from layercast.server.settings import ModelSettings

logger = logging.getLogger(__name__)

SILENT = "gave no value when the version was loaded: its parent computes without calling it here"


def restricted(manifest: Manifest, settings: ModelSettings) -> Manifest:
    """Return `manifest` with the layers that the settings keep back marked unavailable, with the reason."""
    if settings.features == "false":
        return unavailable(manifest, lambda layer: OFF)
    listed: set[str] = set()
    for pattern in settings.feature_layers:
        found = match_layers(pattern, manifest.layers_by_path)
        if not found and manifest.layers:
            logger.warning("%s: feature_layers: %r selects no layer", manifest.name, pattern)
        listed.update(found)
    manifest = unavailable(manifest, lambda layer: "" if layer.path in listed else NOT_LISTED)
    if settings.features == "pooled":
        return unavailable(manifest, _not_pooled)
    return manifest


def without_silent(manifest: Manifest, eager: EagerEngine, inputs: Inputs) -> Manifest:
    """Return `manifest` with the layers marked unavailable that give no value in one forward of `inputs` here.

    An index comes from the export; another torch may compute without calling a module that was called there.
    """
    given = eager.given(inputs)
    silent = [layer.path for layer in manifest.layers if layer.available and layer.path not in given]
    if silent:
        logger.warning("%s: layers are not available: %s %s", manifest.name, ", ".join(silent), SILENT)
    return unavailable(manifest, lambda layer: "" if layer.path in given else SILENT)


def unavailable(manifest: Manifest, reason: Callable[[LayerSpec], str]) -> Manifest:
    """Return `manifest` with the available layers for which there is a `reason` marked unavailable for it."""
    reasons = {layer.path: reason(layer) for layer in manifest.layers if layer.available}
    if not any(reasons.values()):
        return manifest
    layers = tuple(_marked(layer, reasons) for layer in manifest.layers)
    values = {path: value for path, value in manifest.onnx_values.items() if not reasons.get(path)}
    return Manifest.model_validate(manifest.model_dump() | {"layers": layers, "onnx_values": values})


def _marked(layer: LayerSpec, reasons: Mapping[str, str]) -> LayerSpec:
    reason = reasons.get(layer.path)
    return layer.model_copy(update={"available": False, "reason": reason}) if reason else layer


def _not_pooled(layer: LayerSpec) -> str:
    """Return why no tap of the layer is allowed where only pooled ones are; "" if one is."""
    for reducer in ("none", *POOLING):
        try:
            reduced_shape([max(size, 1) for size in layer.shape], reducer)
        except ReducerError:
            continue
        if pools(layer.shape, reducer):
            return ""
    return f"{POOLED_ONLY}, and none of these leaves [N, D] of this one"
