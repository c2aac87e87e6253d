"""Programs with attention, made by hand, and the engine encoder on them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from layercast.models.manifest import Manifest
from layercast.models.onnx_runtime import onnxruntime
from layercast.server.engines.encoder.body import Body, body_of
from layercast.server.engines.encoder.engine import EncoderEngine

LANES = 16
"""Heads of a multiple of them are one of AVX2's 8 too."""
WIDTH = 32
TOKENS = ["n", "t", WIDTH]
WEIGHTS = {
    "qkv": [WIDTH, 3 * WIDTH], "qkv_bias": [3 * WIDTH], "m": [WIDTH, WIDTH], "m_bias": [WIDTH], "g": [WIDTH],
    "g_bias": [WIDTH], "up": [WIDTH, 48], "one": [1], "row": [1, WIDTH], "matrix": [WIDTH, WIDTH], "none": [0, WIDTH],
    "narrow": [WIDTH, 12], "square": [WIDTH, 2 * WIDTH], "long": [97], "even": [WIDTH, 3, WIDTH],
}  # fmt: skip


def node(kind: str, sources: str, targets: str, **attributes: Any) -> NodeProto:
    """Return a node; names are separated by spaces, and "-" is none."""
    names = [[name.strip("-") for name in part.split()] for part in (sources, targets)]
    domain = "com.microsoft" if kind == "Attention" else ""
    return helper.make_node(kind, *names, domain=domain, **attributes)


def attend(
    source: str = "x", target: str = "a", mask: str = "", weights: str = "qkv qkv_bias", **also: Any
) -> NodeProto:
    return node("Attention", f"{source} {weights} {mask}", target, **{"num_heads": 2} | also)


def program(
    *nodes: NodeProto,
    end: str = "y",
    inputs: tuple[ValueInfoProto, ...] = (),
    known: tuple[str, ...] = (),
    outputs: Any = None,
) -> bytes:
    """Return a program of these nodes; it says of the values `known` that they are tokens, as the output `end` is."""
    rng = np.random.default_rng(1)
    made = [
        helper.make_tensor(name, TensorProto.FLOAT, dims, rng.normal(0, 0.3, math.prod(dims)).astype("f4"))
        for name, dims in WEIGHTS.items()
    ]
    made.append(helper.make_tensor("shown", TensorProto.INT32, [1, 3], [1, 1, 0]))
    made += [helper.make_tensor(name, TensorProto.INT64, [1], [at]) for name, at in (("axis1", 1), ("axis2", 2))]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, TOKENS) for name in ("x", end, *known)]
    graph = helper.make_graph(
        list(nodes), "g", [values[0], *inputs], outputs or values[1:2], made, value_info=values[2:]
    )
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=9).SerializeToString()


MASK = helper.make_tensor_value_info("shows", TensorProto.INT32, ["n", "t"])
FACTOR = helper.make_tensor_value_info("factor", TensorProto.FLOAT, ["n", 1, 1])


def taken(*nodes: NodeProto, **also: Any) -> Body | None:
    return body_of(program(*nodes, **also), LANES)


def targets(body: Body | None) -> list[str]:
    return [step.target for step in body.steps] if body else []


def engine(directory: Path, content: bytes, monkeypatch, *inputs: ValueInfoProto) -> EncoderEngine:
    """Return the engine of an artefact whose program is `content`."""
    manifest = Manifest.read(directory)
    monkeypatch.setattr(Manifest, "read_verified", lambda manifest, directory, name: content)
    spec = manifest.inputs[0]
    others = [
        spec.model_copy(
            update={
                "name": value.name, "datatype": "INT32" if value.name == "shows" else "FP32",
                "shape": tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim),
            }
        )
        for value in inputs
    ]  # fmt: skip
    output = manifest.outputs[0].model_copy(update={"name": "y"})
    made = manifest.model_copy(update={"inputs": (spec, *others), "outputs": (output,)})
    return EncoderEngine(directory, made).with_threads(2)


def by_onnx_runtime(content: bytes, inputs: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["y"], inputs)[0]
