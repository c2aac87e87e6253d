"""ONNX programs whose weights lie in other files: none is read, whatever the program says where they are."""

from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from layercast.server.engines.base import EngineError
from layercast.server.engines.onnx import open_session

SECRET = np.arange(4, dtype="f4")


def program(tensor: TensorProto, inside: str) -> bytes:
    """Return a model that adds `tensor` to its input, kept at the top, in a branch, or as a constant."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    add = helper.make_node("Add", ["x", "w"], ["y"])
    if inside == "top":
        graph = helper.make_graph([add], "g", [x], [y], [tensor])
    elif inside == "constant":
        graph = helper.make_graph([helper.make_node("Constant", [], ["w"], value=tensor), add], "g", [x], [y])
    else:
        branch = helper.make_graph([add], "b", [], [y], [tensor])
        always = helper.make_tensor("c", TensorProto.BOOL, [], [True])
        chosen = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([chosen], "g", [x], [y], [always])
    model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def external(location: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "secret.bin"
    path.write_bytes(SECRET.tobytes())
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize("inside", ["top", "branch", "constant"])
@pytest.mark.parametrize("where", ["absolute", "relative", "upwards", "descriptor"])
def test_weights_in_another_file_are_refused(secret: Path, where: str, inside: str) -> None:
    with secret.open("rb") as opened:
        location = {
            "absolute": str(secret),
            "relative": secret.name,
            "upwards": "../../.." + str(secret),
            "descriptor": str(opened.fileno()),
        }[where]
        with pytest.raises(EngineError, match=r"model\.onnx can't be loaded") as refused:
            open_session(program(external(location), inside), "model.onnx", 1)
    # What the program itself names may be said, where its file was read from not.
    assert "/proc/" not in str(refused.value)


@pytest.mark.parametrize("inside", ["top", "branch", "constant"])
def test_the_same_weights_inside_are_read(inside: str) -> None:
    own = helper.make_tensor("w", TensorProto.FLOAT, [4], SECRET)
    session = open_session(program(own, inside), "model.onnx", 1)
    np.testing.assert_array_equal(session.run(None, {"x": np.zeros(4, "f4")})[0], SECRET)
