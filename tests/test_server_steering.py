"""Steered answers of a running server against offline forwards with the same edit written out by hand."""

import asyncio
import copy
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np
import pytest
import torch
from google.rpc.error_details_pb2 import BadRequest
from grpc_status import rpc_status
from serving import Running, running
from test_server_features import arrays, extract, hooked
from test_server_inference import INPUTS, assert_answers, offline, request, rows_for, values_of, wait_until
from torch import Tensor, nn

from layercast.client import AsyncClient, Client, Edit, InputWarning, InvalidArgument, PermissionDenied
from layercast.models import edits
from layercast.models.hooks import registered_hooks
from layercast.proto.messages import Edit as EditMessage
from layercast.proto.messages import SteerRequest
from layercast.server.work import Tap, Work

OUTPUT = {"mnist": "logits", "resnet": "logits", "transformer": "logits", "shared": "output"}


@pytest.fixture(scope="module")
def steering(repository) -> Iterator[Running]:
    with running(repository, max_batch=16, steering=True, engine="torchscript") as server:
        yield server


@pytest.fixture
def client(steering) -> Iterator[Client]:
    with Client(steering.url) as client:
        yield client


def by_hand(module: nn.Module, x: np.ndarray, path: str, change: Callable[[Tensor], Tensor], call: int = 0):
    """Forward of a copy of the module in which the one at `path` has `change` written into its forward."""
    double = copy.deepcopy(module)
    part = double.get_submodule(path)
    forward, calls = part.forward, iter(range(100))
    part.forward = lambda *args, **kwargs: (
        change(forward(*args, **kwargs).clone()) if next(calls) == call else forward(*args, **kwargs)
    )
    return offline(double, x)


def into_heads(module: nn.Module, x: np.ndarray, path: str, change: Callable[[Tensor], Tensor]):
    """Forward of a copy of the module in which `change` is given the joined heads, [N, T, H, D/H], before `out`."""
    double = copy.deepcopy(module)
    attention = double.get_submodule(path)
    forward = attention.out.forward
    attention.out.forward = lambda joined: forward(
        change(joined.clone().unflatten(2, (attention.num_heads, -1))).flatten(2)
    )
    return offline(double, x)


def put(where, value) -> Callable[[Tensor], Tensor]:
    """Return a change that assigns `value`, or what it makes of the tensor, at the index `where`."""

    def change(tensor: Tensor) -> Tensor:
        tensor[where] = value(tensor) if callable(value) else value
        return tensor

    return change


ALL = slice(None)
VECTOR = [0.5, -2.0, 3.0]
DENSE = {
    "zero units": (Edit.zero("net.0", units=[3, 0, 200]), "net.0", put((ALL, [3, 0, 200]), 0.0)),
    "zero all": (Edit.zero("net.2"), "net.2", put(ALL, 0.0)),
    "scale": (Edit.scale("net.0.0", -1.5, units=range(100)), "net.0.0", put((ALL, slice(100)), lambda v: v[:, :100] * -1.5)),
    "add": (
        Edit.add("net.0.1", VECTOR, units=np.array([7, 3, 5])),
        "net.0.1",
        put((ALL, [7, 3, 5]), lambda v: v[:, [7, 3, 5]] + torch.tensor(VECTOR)),
    ),
    "add all": (Edit.add("net.4", np.arange(10)), "net.4", lambda v: v + torch.arange(10.0)),
    "clamp": (Edit.clamp("net.0.0", -0.1, 0.2), "net.0.0", lambda v: v.clamp(-0.1, 0.2)),
    "clamp low": (Edit.clamp("net.4", low=0.1, units=4), "net.4", put((ALL, 4), lambda v: v[:, 4].clamp(min=0.1))),
    "mean": (Edit.mean("net.2", units=range(50)), "net.2", put((ALL, slice(50)), lambda v: v[:, :50].mean(0))),
}  # fmt: skip
PICTURES = {
    "channels": (Edit.zero("layer1.0", channels=[3, 60]), "layer1.0", put((ALL, [3, 60]), 0.0)),
    "before in-place": (Edit.scale("bn", 3.0, channels=5), "bn", put((ALL, 5), lambda v: v[:, 5] * 3)),
    "in place itself": (Edit.clamp("relu", high=0.3), "relu", lambda v: v.clamp(max=0.3)),
    "places": (
        Edit.zero("layer2", positions=[0, 17]), "layer2",
        lambda v: put((ALL, ALL, 1, 1), 0.0)(put((ALL, ALL, 0, 0), 0.0)(v)),
    ),
    "channels at places": (
        Edit.add("layer2.1.conv1", [4.0, -4.0], channels=[2, 1], positions=18), "layer2.1.conv1",
        put((ALL, [2, 1], 1, 2), lambda v: v[:, [2, 1], 1, 2] + torch.tensor([4.0, -4.0])),
    ),
    "mean over space": (
        Edit.mean("layer1.1", channels=[0, 9]), "layer1.1",
        put((ALL, [0, 9]), lambda v: v[:, [0, 9]].mean((0, 2, 3), keepdim=True)),
    ),
    "pooled": (Edit.zero("flatten", units=range(0, 128, 2)), "flatten", put((ALL, slice(0, 128, 2)), 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_units_of_a_dense_model(client, modules, name):
    edit, path, change = DENSE[name]
    x = rows_for("mnist", 3)
    got = client.steer("mnist", x, edit)
    assert list(got) == ["logits"]
    np.testing.assert_allclose(got["logits"], by_hand(modules["mnist"], x, path, change), atol=1e-5)
    assert np.abs(got["logits"] - offline(modules["mnist"], x)).max() > 1e-3


@pytest.mark.parametrize("name", PICTURES)
def test_channels_and_places_of_a_convolutional_model(client, modules, name):
    edit, path, change = PICTURES[name]
    x = rows_for("resnet", 2)
    got = client.steer("resnet", x, edit, outputs="logits")["logits"]
    np.testing.assert_allclose(got, by_hand(modules["resnet"], x, path, change), atol=1e-4, rtol=1e-4)
    assert np.abs(got - offline(modules["resnet"], x)).max() > 1e-4


TOKENS = rows_for("transformer", 3, 20)  # the last five are padding
TOKENS[1, 0] = TOKENS[1, 7] = 256  # as are two before them, in the second row


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        (Edit.zero("blocks.0.attn", heads=[1]), put((ALL, ALL, 1), 0.0)),
        (Edit.scale("blocks.0.attn", -2.0, heads=[1, 0]), lambda v: v * -2),
        (Edit.zero("blocks.0.attn", heads=[0], positions=[2]), put(([0, 1, 2], [2, 3, 2], 0), 0.0)),
        (Edit.add("blocks.0.attn", np.arange(8), heads=[1]), put((ALL, ALL, 1), lambda v: v[:, :, 1] + torch.arange(8.0))),
        (
            Edit.mean("blocks.0.attn", heads=[0]),
            put((ALL, ALL, 0), lambda v: v[torch.from_numpy(TOKENS != 256)][:, 0].mean(0)),
        ),
    ],
    ids=["zero", "scale", "position", "add", "mean"],
)  # fmt: skip
def test_heads_of_attention(client, modules, edit, change):
    got = client.steer("transformer", TOKENS, edit)["logits"]
    np.testing.assert_allclose(got, into_heads(modules["transformer"], TOKENS, "blocks.0.attn", change), atol=1e-5)
    assert np.abs(got - offline(modules["transformer"], TOKENS)).max() > 1e-5


@pytest.mark.parametrize(
    ("edit", "path", "change"),
    [
        # Positions 0 and 6 are tokens 1 and 8 of the row with padding inside.
        (Edit.zero("token", positions=[0, 6]), "token", put(([0, 0, 1, 1, 2, 2], [0, 6, 1, 8, 0, 6]), 0.0)),
        (
            Edit.add("blocks.0", [9.0, -9.0], units=[3, 2], positions=3), "blocks.0",
            lambda v: put((ALL, ALL, [3, 2]), v[..., [3, 2]] + torch.tensor([9.0, -9.0]) * _fourth())(v),
        ),
        (Edit.mean("blocks.1", units=[0, 1]), "blocks.1", put(
            (ALL, ALL, [0, 1]), lambda v: v[torch.from_numpy(TOKENS != 256)][:, [0, 1]].mean(0))),
        (Edit.scale("blocks.0.attn.weights", 0.25, channels=0), "blocks.0.attn.weights", put(
            (ALL, 0), lambda v: v[:, 0] * 0.25)),
    ],
    ids=["zero", "add", "mean", "map"],
)  # fmt: skip
def test_token_positions_do_not_count_padding(client, modules, edit, path, change):
    got = client.steer("transformer", TOKENS, edit)["logits"]
    np.testing.assert_allclose(got, by_hand(modules["transformer"], TOKENS, path, change), atol=1e-5)
    assert np.abs(got - offline(modules["transformer"], TOKENS)).max() > 1e-6


def _fourth() -> Tensor:
    """1 at the fourth token that counts of each row of TOKENS, else 0: [3, 20, 1]."""
    marks = torch.zeros(3, 20, 1)
    marks[[0, 1, 2], [3, 4, 3]] = 1
    return marks


@pytest.mark.parametrize("call", [0, 1])
def test_one_call_of_a_module_that_is_used_twice(client, modules, call):
    x = rows_for("shared", 2)
    got = client.steer("shared", x, Edit.scale(f"shared#{call}", 2.0, units=range(5)))["output"]
    change = put((ALL, slice(5)), lambda v: v[:, :5] * 2)
    np.testing.assert_allclose(got, by_hand(modules["shared"], x, "shared", change, call), atol=1e-5)


def test_edits_of_a_request_are_made_in_order_and_layers_show_them(client, modules):
    x = rows_for("mnist", 2)
    asked = [
        Edit.add("net.0", np.full(512, 2.0)),
        Edit.clamp("net.0", high=2.5),
        Edit.zero("net.4", units=[0]),
        Edit.zero("net.0", units=[5]),
    ]
    got = client.steer("mnist", x, asked, layers=["net.0", "net.1@norm", "net.0.2"])
    before = hooked(modules["mnist"], x)["net.0"][0]
    wanted = np.clip(before + 2, None, 2.5)
    wanted[:, 5] = 0
    np.testing.assert_allclose(got["net.0"], wanted, atol=1e-5)
    np.testing.assert_allclose(
        got["net.1@norm"], wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-5, err_msg="what follows"
    )
    np.testing.assert_allclose(got["net.0.2"], before, atol=1e-5, err_msg="what goes before")
    rest = by_hand(modules["mnist"], x, "net.0", lambda v: torch.from_numpy(wanted))
    rest[:, 0] = 0
    np.testing.assert_allclose(got["logits"], rest, atol=1e-5)


@contextmanager
def held(server: Running, model: str, rows: int) -> Iterator[ThreadPoolExecutor]:
    """Let what is asked inside wait until `rows` rows do, then run."""
    batcher = server.server.repository.find(model, "").batcher
    server.on_loop(batcher.hold)
    try:
        with ThreadPoolExecutor(16) as pool:
            yield pool
            wait_until(server, lambda: batcher.queued_rows == rows)
            server.on_loop(batcher.release)
    finally:
        server.on_loop(batcher.release)


def steer(server: Running, model: str, x: np.ndarray, asked, **fields):
    message = SteerRequest(model_name=model, edits=[edit.message for edit in asked], **fields)
    datatype = "INT64" if model == "transformer" else "FP32"
    message.inputs.add(name=INPUTS[model], datatype=datatype, shape=x.shape, data=x.tobytes())
    return server.call("Steer", message)


def test_steered_requests_share_a_forward_and_edit_only_their_own_rows(steering, modules):
    model = steering.server.repository.find("mnist", "")
    xs = [rows_for("mnist", rows) for rows in (1, 3, 2, 1)]
    asked = [DENSE[name] for name in ("mean", "mean", "zero all", "clamp")]
    before = model.monitor.statistics.executions
    with held(steering, "mnist", 7) as pool:
        calls = [pool.submit(steer, steering, "mnist", x, [edit[0]]) for x, edit in zip(xs, asked, strict=True)]
    assert model.monitor.statistics.executions == before + 1
    for x, (_, path, change), call in zip(xs, asked, calls, strict=True):
        assert call.result().timing.batch_rows == 7
        got = arrays(call.result().outputs)["logits"]
        np.testing.assert_allclose(got, by_hand(modules["mnist"], x, path, change), atol=1e-5)


def test_neighbours_of_every_kind_keep_their_answers(steering, modules):
    """Sixteen threads, three kinds of request for one model at the same time."""
    xs = [rows_for("mnist", 1 + i % 2) for i in range(48)]
    cases = list(DENSE.values())
    with ThreadPoolExecutor(16) as pool:
        calls = []
        for i, x in enumerate(xs):
            if i % 3 == 0:
                calls.append(pool.submit(steering.call, "ModelInfer", request("mnist", x)))
            elif i % 3 == 1:
                calls.append(pool.submit(extract, steering, "mnist", x, ["net.2"], ["logits"]))
            else:
                calls.append(pool.submit(steer, steering, "mnist", x, [cases[i % len(cases)][0]]))
    for i, (x, call) in enumerate(zip(xs, calls, strict=True)):
        plain = offline(modules["mnist"], x)
        if i % 3 == 0:
            np.testing.assert_allclose(values_of(call.result()), plain, atol=1e-5)
        elif i % 3 == 1:
            got = {**arrays(call.result().layers), **arrays(call.result().outputs)}
            np.testing.assert_allclose(got["logits"], plain, atol=1e-5)
            np.testing.assert_allclose(got["net.2"], hooked(modules["mnist"], x)["net.2"][0], atol=1e-5)
        else:
            _, path, change = cases[i % len(cases)]
            wanted = by_hand(modules["mnist"], x, path, change)
            np.testing.assert_allclose(arrays(call.result().outputs)["logits"], wanted, atol=1e-5)
    assert registered_hooks(model_of(steering, "mnist")) == []


def test_in_one_forward_the_rows_of_others_are_the_same_to_the_last_bit(steering):
    """Below the batcher, which keeps them apart, works of every kind run together."""
    loaded = steering.server.repository.find("resnet", "").loaded
    engine, runner = loaded.runner.eager, loaded.runner
    planned = engine.plan(
        engine.manifest.layers_by_path, edits.Edit("bn", edits.Zero(), channels=tuple(range(1, 33))), edits.Request(2)
    )
    tap = Tap("relu")

    def works(own) -> list[Work]:
        xs = [rng.random((2, 3, 32, 32), "f4") for rng in map(np.random.default_rng, range(3))]
        return [Work({"image": x}, 2, "key", taps=(tap,), edits=own if i == 1 else ()) for i, x in enumerate(xs)]

    plain, changed = runner(works(())), runner(works((planned,)))
    for at in (0, 2):
        np.testing.assert_array_equal(changed[at].outputs["logits"], plain[at].outputs["logits"])
        np.testing.assert_array_equal(changed[at].features[tap], plain[at].features[tap])
    assert (changed[1].features[tap][:, 1:33] == 0).all()
    assert (changed[1].outputs["logits"] != plain[1].outputs["logits"]).any()


def model_of(server: Running, name: str) -> nn.Module:
    return server.server.repository.find(name, "").loaded.runner.eager._module


def test_a_request_of_more_rows_than_a_batch_runs_in_parts_unless_it_takes_a_mean(client, modules):
    x = rows_for("mnist", 37)
    edit, path, change = DENSE["scale"]
    np.testing.assert_allclose(
        client.steer("mnist", x, edit)["logits"], by_hand(modules["mnist"], x, path, change), atol=1e-5
    )
    with pytest.raises(
        InvalidArgument, match="a mean is taken over rows that run together, model 'mnist' runs at most 16"
    ):
        client.steer("mnist", x, DENSE["mean"][0])


def test_no_rows_give_an_empty_answer(client):
    got = client.steer("mnist", np.zeros((0, 1, 28, 28), "f4"), Edit.mean("net.0"), layers="net.0")
    assert {name: values.shape for name, values in got.items()} == {"logits": (0, 10), "net.0": (0, 512)}


def test_steering_is_off_until_the_operator_turns_it_on(served, modules):
    x = rows_for("mnist", 1)
    with Client(served.url) as client, pytest.raises(PermissionDenied, match="steering is off for model 'mnist'.*true"):
        client.steer("mnist", x, Edit.zero("net.0"))
    assert counted(served, "mnist") == 0
    assert_answers(served, modules)


def counted(server: Running, model: str) -> float:
    with urllib.request.urlopen(server.metrics, timeout=10) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(f'layercast_steered_requests_total{{model="{model}"'):
                return float(line.rpartition(" ")[2])
    raise AssertionError("no such series")


def test_steered_requests_are_counted(steering, client):
    before = counted(steering, "shared")
    client.steer("shared", rows_for("shared", 1), Edit.zero("relu"))
    assert counted(steering, "shared") == before + 1


WRONG = {
    "no edits": ([], "edits", "no edits are given"),
    "too many": ([Edit.zero("net.0")] * 65, "edits", "65 edits are given, at most 64"),
    "unknown": ([Edit.zero("net.99")], "edits[0].layer", "no layer 'net.99'; nearest: net"),
    "pattern": ([Edit.zero("net.*")], "edits[0].layer", "the name of one layer, not a pattern"),
    "empty": ([Edit.zero("")], "edits[0].layer", "want the name of a layer"),
    "long": ([Edit.zero("n" * 257)], "edits[0].layer", "at most 256 characters"),
    "no action": ([Edit(EditMessage(layer="net.0"))], "edits[0]", "no action is given; want one of zero"),
    "second": (
        [Edit.zero("net.0"), Edit.zero("net.0", units=[0, 512])], "edits[1].units[1]", "512 units, 0 to 511, got 512"),
    "negative": ([Edit.zero("net.0", units=-1)], "edits[0].units[0]", "got -1"),
    "twice": ([Edit.zero("net.0", units=[4, 4])], "edits[0].units[1]", "4 is given twice"),
    "both": ([Edit.zero("net.0", units=1, channels=1)], "edits[0].channels", "units and channels are both given"),
    "heads": ([Edit.zero("net.0", heads=0)], "edits[0].heads", "a Block is no MultiHeadAttention"),
    "positions": ([Edit.zero("net.0", positions=0)], "edits[0].positions", "has no positions"),
    "short": ([Edit.add("net.0", [1.0])], "edits[0].add.values", "1 numbers for the 512 units"),
    "nan": ([Edit.add("net.0", [1.0, np.nan], units=[1, 2])], "edits[0].add.values[1]", "want a finite number"),
    "infinite": ([Edit.scale("net.0", np.inf)], "edits[0].scale", "want a finite number"),
    "too large": ([Edit.scale("net.0", 1e39)], "edits[0].scale", "that FP32 holds"),
    "no bound": ([Edit.clamp("net.0")], "edits[0].clamp", "neither low nor high"),
    "crossed": ([Edit.clamp("net.0", 2, 1)], "edits[0].clamp", "low, 2, is above high, 1"),
    "nan bound": ([Edit.clamp("net.0", high=np.nan)], "edits[0].clamp.high", "want a finite number"),
}  # fmt: skip
WRONG_ELSEWHERE = {
    "transformer": {
        "no such head": ([Edit.zero("blocks.0.attn", heads=2)], "edits[0].heads[0]", "has 2 heads, 0 to 1, got 2"),
        "padding": ([Edit.zero("blocks.0", positions=[1, 13])], "edits[0].positions[1]", "row 1 has 13 tokens"),
        "beyond": ([Edit.zero("blocks.0", positions=20)], "edits[0].positions[0]", "20 positions, 0 to 19, got 20"),
        "unavailable": ([Edit.zero("blocks")], "edits[0].layer", "can't be edited: a container"),
        "whole map": ([Edit.zero("blocks.0.attn.weights", units=0)], "edits[0].units", "take channels"),
    },
    "shared": {"repeated": ([Edit.zero("shared")], "edits[0].layer", "it has shared#0, shared#1: name one")},
    "resnet": {
        "place": ([Edit.zero("layer2", positions=256)], "edits[0].positions[0]", "256 positions, 0 to 255"),
        "units": ([Edit.zero("layer2", units=1)], "edits[0].units", "take channels"),
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name"),
    [("mnist", name) for name in WRONG] + [(model, name) for model, cases in WRONG_ELSEWHERE.items() for name in cases],
)
def test_a_wrong_edit_is_refused_with_its_place(steering, modules, model, name):
    asked, field, text = WRONG[name] if model == "mnist" else WRONG_ELSEWHERE[model][name]
    x = TOKENS if model == "transformer" else rows_for(model, 2)
    with pytest.raises(grpc.RpcError) as raised:
        steer(steering, model, x, asked)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in raised.value.details()
    violation = BadRequest()
    rpc_status.from_call(raised.value).details[0].Unpack(violation)
    assert violation.field_violations[0].field == field
    assert registered_hooks(model_of(steering, model)) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"outputs": ["logit"]}, "nearest: logits"),
        ({"outputs": ["layer:net.0"]}, "layers are asked for in `layers`"),
        ({"layers": ["net.9"]}, "no layer 'net.9'"),
    ],
)
def test_wrong_names_of_what_is_wanted(steering, fields, text):
    with pytest.raises(grpc.RpcError, match=text) as raised:
        steer(steering, "mnist", rows_for("mnist", 1), [Edit.zero("net.0")], **fields)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_hooks_are_gone_after_an_error_inside_the_forward(steering, modules, monkeypatch):
    module = model_of(steering, "mnist")

    def fail(*_):
        raise RuntimeError("this text is for the log only")

    monkeypatch.setattr(module.net[2], "forward", fail)
    with pytest.raises(grpc.RpcError, match="internal error [0-9a-f]{12}"):
        steer(steering, "mnist", rows_for("mnist", 1), [Edit.zero("net.0")])
    monkeypatch.undo()
    assert registered_hooks(module) == []
    assert_answers(steering, modules)
    np.testing.assert_allclose(
        values_of(steering.call("ModelInfer", request("mnist", x := rows_for("mnist", 2)))),
        offline(modules["mnist"], x),
        atol=1e-5,
    )


def test_doubts_about_the_inputs_are_warnings_whatever_is_asked(client):
    asked: dict[str, Callable[[np.ndarray], object]] = {
        "steer": lambda x: client.steer("mnist", x, Edit.zero("net.0")),
        "features": lambda x: client.features("mnist", x, "net.0"),
        "stream_features": lambda x: list(client.stream_features("mnist", x, "net.0")),
        "predict": lambda x: client.predict("mnist", x),
    }
    for name, ask in asked.items():
        x = rows_for("mnist", 2)
        ask(x)  # warnings are errors in tests
        x[:, 0, 3, 3] = 0.0, 7.0
        with pytest.warns(InputWarning, match="want values from 0 to 1, got 0 to 7") as caught:
            ask(x)
        assert [each.filename for each in caught] == [__file__], name


def test_the_async_client_and_edits_that_it_refuses_itself(steering, modules):
    x = rows_for("mnist", 2)
    edit, path, change = DENSE["add"]

    async def asked() -> dict[str, np.ndarray]:
        async with AsyncClient(steering.url) as client:
            return await client.steer("mnist", x, [edit], outputs=["logits"], layers="net.0.1", reduce="norm")

    got = asyncio.run(asked())
    assert list(got) == ["logits", "net.0.1@norm"]
    np.testing.assert_allclose(got["logits"], by_hand(modules["mnist"], x, path, change), atol=1e-5)
    with pytest.raises(InvalidArgument, match=r"edit of 'net.0': want a vector of one dimension, got shape \[1, 2\]"):
        Edit.add("net.0", [[1.0, 2.0]])
    with pytest.raises(TypeError, match="integer"):
        Edit.zero("net.0", units=[0.5])


def test_a_token_takes_features_and_for_the_outputs_predict(one_model, tmp_path, modules):
    path, x = tmp_path / "tokens.toml", rows_for("shared", 1)
    tokens = {scopes: f"token-{len(scopes)}-0123456789abcdef" for scopes in (("features",), ("features", "predict"))}
    path.write_text(
        "".join(
            f'[[tokens]]\nname = "{"-".join(scopes)}"\ntoken = "{token}"\nscopes = {list(scopes)}\n'
            for scopes, token in tokens.items()
        )
    )
    path.chmod(0o600)
    with running(one_model, engine="eager", token_file=path, steering=True) as server:
        with Client(server.url, token=tokens["features",]) as client:
            client.features("shared", x, "relu")
            with pytest.raises(PermissionDenied, match="do not allow asking for outputs; it takes predict"):
                client.steer("shared", x, Edit.zero("relu"))
        with Client(server.url, token=tokens["features", "predict"]) as client:
            got = client.steer("shared", x, Edit.zero("relu"))["output"]
    np.testing.assert_allclose(got, by_hand(modules["shared"], x, "relu", put(ALL, 0.0)), atol=1e-5)


def test_a_model_without_its_module_says_so(steering, client, monkeypatch):
    monkeypatch.setattr(steering.server.repository.find("shared", "").loaded.runner, "eager", None)
    with pytest.raises(InvalidArgument, match="can't be steered: its code is not trusted here"):
        client.steer("shared", rows_for("shared", 1), Edit.zero("relu"))
