"""Attention maps over the wire against softmax(q·kᵀ) by hand, and rollout against one in numpy."""

import math

import attention_modules
import grpc
import numpy as np
import pytest
import torch
from conftest import in_one_thread
from serving import running
from test_attention_maps import of_torchs
from test_server_features import arrays
from test_server_inference import values_of

from layercast.models import registry
from layercast.models.export.writer import export_artefact
from layercast.models.hooks import fused_attention_off
from layercast.proto.messages import (
    ExplainOptions,
    ExplainRequest,
    ExtractRequest,
    ListLayersRequest,
    ModelInferRequest,
)

ARCHITECTURES = {
    "pre": ("TransformerEncoder", {"norm_first": True}),
    "post": ("TransformerEncoder", {"norm_first": False}),
    "causal": ("TransformerEncoder", {"causal": True}),
    "torch-post": ("attention_modules:TorchEncoder", {"norm_first": False}),
    "torch-pre": ("attention_modules:TorchEncoder", {"norm_first": True, "batch_first": False}),
    "bert-eager": ("attention_modules:Bert", {"attention": "eager"}),
    "bert-sdpa": ("attention_modules:Bert", {"attention": "sdpa"}),
}
OURS = ("pre", "post", "causal")
SMALL = {"max_length": 16, "embed_dim": 8, "num_heads": 2, "ff_dim": 16, "num_blocks": 2}
PAD = {name: 256 if name in OURS else 0 for name in ARCHITECTURES}
RNG = np.random.default_rng(2)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(3)
    made = {}
    for name, (architecture, arguments) in ARCHITECTURES.items():
        if name in OURS:
            made[name] = registry.build(architecture, **SMALL, **arguments).eval()
        else:
            made[name] = getattr(attention_modules, architecture.partition(":")[2])(**arguments).eval()
    return made


@pytest.fixture(scope="module")
def attending(models, tmp_path_factory):
    """A server of every kind of attention; what runs predictions is the module itself."""
    root = tmp_path_factory.mktemp("attending")
    with in_one_thread():
        for name, module in models.items():
            architecture, arguments = ARCHITECTURES[name]
            pad, width = PAD[name], 16 if name.startswith("bert") else 2
            tokens = {"name": "tokens", "datatype": "INT64", "shape": [-1, -1], "pad": pad, "max_length": 16}
            card = {
                "name": name,
                "architecture": architecture,
                "arguments": {**(SMALL if name in OURS else {}), **arguments},
                "inputs": [{**tokens, "range": [0, max(pad, 99)]}],
                "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, width]}],
            }
            export_artefact(module, card, root / name / "1", programs=())
    with running(root, trust=("attention_modules",)) as server:
        yield server


def texts(name: str) -> np.ndarray:
    """Three rows of nine tokens: whole, padded from the sixth, and where the model can bear it nothing but padding."""
    tokens = RNG.integers(1, 99, (3, 9))
    tokens[1, 5:] = PAD[name]
    if name in OURS:
        tokens[2] = PAD[name]
    return tokens


def extract(server, name: str, tokens: np.ndarray, *layers: str) -> dict[str, np.ndarray]:
    message = ExtractRequest(model_name=name, layers=layers)
    message.inputs.add(name="tokens", datatype="INT64", shape=tokens.shape, data=tokens.tobytes())
    return arrays(server.call("Extract", message).layers)


def by_hand(query: np.ndarray, key: np.ndarray, heads: int, hidden: np.ndarray) -> np.ndarray:
    """[N, H, T, S] of projected [N, T, D]; a query that may attend to nothing has a row of zeros."""
    q, k = (x.astype("f8").reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (query, key))
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
    weights = np.where(hidden, 0.0, np.exp(scores - scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def hidden_keys(name: str, tokens: np.ndarray) -> np.ndarray:
    length = tokens.shape[1]
    later = np.triu(np.ones((length, length), bool), 1) & (name == "causal")
    return (tokens == PAD[name])[:, None, None] | later


@pytest.mark.parametrize("name", OURS)
def test_our_maps_are_softmax_of_the_scores(attending, name):
    tokens = texts(name)
    hidden = hidden_keys(name, tokens)
    got = extract(attending, name, tokens, "blocks.*.attn.query", "blocks.*.attn.key", "blocks.*.attn.weights")
    for block in ("blocks.0.attn", "blocks.1.attn"):
        maps = got[f"{block}.weights"]
        np.testing.assert_allclose(maps, by_hand(got[f"{block}.query"], got[f"{block}.key"], 2, hidden), atol=1e-6)
        np.testing.assert_allclose(maps[:2].sum(-1), 1, atol=1e-6)
        assert not maps[np.broadcast_to(hidden, maps.shape)].any(), "masked columns are zero"
        assert not maps[2].any(), "a row that may attend to nothing is zero"
        assert not np.isnan(maps).any()
    for row in range(3):  # the same without company, and without the padding at its end
        alone = extract(attending, name, tokens[row : row + 1], "blocks.1.attn.weights")["blocks.1.attn.weights"]
        np.testing.assert_allclose(alone[0], got["blocks.1.attn.weights"][row], atol=1e-6)
    short = extract(attending, name, tokens[1:2, :5], "blocks.1.attn.weights")["blocks.1.attn.weights"]
    np.testing.assert_allclose(short[0], got["blocks.1.attn.weights"][1, :, :5, :5], atol=1e-6)


@pytest.mark.parametrize("name", ["pre", "torch-post", "bert-eager"])
def test_heads_gives_their_mean_also_as_an_output_of_model_infer(attending, name):
    tokens = texts(name)
    glob = {"pre": "blocks.*.attn.weights", "torch-post": "*.self_attn[weights]", "bert-eager": "*.attention.self[1]"}
    each = extract(attending, name, tokens, glob[name])
    asked = ModelInferRequest(model_name=name)
    asked.inputs.add(name="tokens", datatype="INT64", shape=tokens.shape)
    asked.raw_input_contents.append(tokens.tobytes())
    asked.outputs.add(name=f"layer:{glob[name]}@heads")
    response = attending.call("ModelInfer", asked)
    assert [output.name for output in response.outputs] == [f"layer:{layer}@heads" for layer in each]
    for index, maps in enumerate(each.values()):
        assert maps.shape == (3, 2, 9, 9)
        assert list(response.outputs[index].shape) == [3, 9, 9]
        np.testing.assert_allclose(values_of(response, index), maps.mean(1), atol=1e-6)


def test_heads_wants_maps(attending):
    with pytest.raises(grpc.RpcError, match=r"'blocks.0': reducer heads wants attention maps, .*\[N, H, T, S\], got"):
        extract(attending, "pre", texts("pre"), "blocks.0@heads")


@pytest.mark.parametrize("name", ["torch-post", "torch-pre"])
def test_torchs_attention_gives_maps_that_it_does_not_return(attending, models, name):
    tokens = texts(name)
    module, inside = models[name], {}

    def keep(path):
        def hook(_module, args, kwargs):
            inside[path] = args[0] if args else kwargs["query"]

        return hook

    handles = [
        layer.self_attn.register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, layer in enumerate(module.encoder.layers)
    ]
    with torch.inference_mode(), fused_attention_off():
        module(torch.from_numpy(tokens))
    for handle in handles:
        handle.remove()
    got = extract(attending, name, tokens, "encoder.layers.*.self_attn[weights]")
    hidden = torch.from_numpy(hidden_keys(name, tokens))
    for index, layer in enumerate(module.encoder.layers):
        x = inside[index] if module.batch_first else inside[index].transpose(0, 1)
        wanted = of_torchs(layer.self_attn, x, hidden)
        maps = got[f"encoder.layers.{index}.self_attn[weights]"]
        np.testing.assert_allclose(maps, wanted, atol=1e-5)
        assert not maps[1, :, :, 5:].any()


def test_a_bert_gives_maps_with_eager_attention_and_says_what_else_it_needs(attending):
    tokens = texts("bert-eager")
    layers = "bert.encoder.layer.0.attention.self"
    got = extract(attending, "bert-eager", tokens, f"{layers}.query", f"{layers}.key", f"{layers}[1]")
    wanted = by_hand(got[f"{layers}.query"], got[f"{layers}.key"], 2, hidden_keys("bert-eager", tokens))
    np.testing.assert_allclose(got[f"{layers}[1]"], wanted, atol=1e-6)
    listed = attending.call("ListLayers", ListLayersRequest(model_name="bert-sdpa", pattern=f"{layers}[1]"))
    (layer,) = listed.layers
    assert not layer.available
    assert "attn_implementation='eager'" in layer.reason
    with pytest.raises(grpc.RpcError, match="can't be tapped: it is None: .*attn_implementation='eager'"):
        extract(attending, "bert-sdpa", tokens, f"{layers}[1]")


@pytest.mark.parametrize("name", [*OURS, "torch-post", "bert-eager"])
def test_rollout_equals_one_in_numpy(attending, name):
    """Abnar and Zuidema 2020: half of each layer is its residual, rows are scaled to one, layers are multiplied."""
    tokens = texts(name)
    glob = {"torch-post": "*.self_attn[weights]", "bert-eager": "*.attention.self[1]"}.get(
        name, "blocks.*.attn.weights"
    )
    joined, keep = np.eye(9)[None], tokens != PAD[name]
    for maps in extract(attending, name, tokens, f"{glob}@heads").values():
        step = (0.5 * np.eye(9) + 0.5 * maps) * keep[:, None]
        joined = step / np.maximum(step.sum(-1, keepdims=True), 1e-30) @ joined
    wanted = (joined * keep[:, :, None]).sum(1) / np.maximum(keep.sum(1, keepdims=True), 1)
    asked = ExplainRequest(model_name=name, method="attention-rollout", options=ExplainOptions(layer=glob))
    asked.inputs.add(name="tokens", datatype="INT64", shape=tokens.shape, data=tokens.tobytes())
    attributions = attending.call("Explain", asked).attributions
    got = np.frombuffer(attributions.data, "<f4").reshape(attributions.shape)
    if name != "bert-eager":  # whose maps only their name tells
        asked.ClearField("options")
        assert attending.call("Explain", asked).attributions == attributions
    np.testing.assert_allclose(got, wanted * keep, atol=1e-6)
    np.testing.assert_allclose(got.sum(1), keep.any(1), atol=1e-5)
