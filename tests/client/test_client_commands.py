"""The command line, run in this process against a real server."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from layercast.client import main as program
from layercast.client.commands.common import SAMPLES
from layercast.proto.messages import ExtractRequest, ModelInferRequest

pytest.importorskip("PIL.Image", reason="Pillow comes with the images extra")

Run = Callable[..., tuple[int, str, str]]


def digit(number: int) -> str:
    return str(SAMPLES / f"digit-{number}.png")


def test_predict_prints_the_label_and_its_probability(run: Run) -> None:
    code, out, err = run("predict", "mnist", digit(7))
    assert (code, err) == (0, "")
    # One logit of ln 9 among nine of 0: 9 / (9 + 9).
    assert out.split() == ["input", "label", "probability", "digit-7.png", "0", "0.5000"]


def test_predict_sends_one_batch_up_to_the_servers_limit(run: Run, server: Any) -> None:
    code, out, _ = run("predict", "mnist", digit(7), digit(2), digit(4), "--top", "3")
    assert code == 0
    assert [list(request.inputs[0].shape) for request in server.asked(ModelInferRequest)] == [
        [2, 1, 28, 28],
        [1, 1, 28, 28],
    ]
    lines = out.splitlines()
    assert len(lines) == 1 + 3 * 3
    assert [line.split()[0] for line in lines[1::3]] == ["digit-7.png", "digit-2.png", "digit-4.png"]
    assert lines[2].split() == ["1", "0.0556"]


def test_predict_json(run: Run) -> None:
    code, out, _ = run("predict", "mnist", digit(7), "--json", "--top", "2")
    assert code == 0
    answer = json.loads(out)
    assert answer["model"] == "mnist"
    (prediction,) = answer["predictions"]
    assert prediction["input"] == "digit-7.png"
    assert prediction["top"] == [
        {"label": "0", "probability": pytest.approx(0.5)},
        {"label": "1", "probability": pytest.approx(1 / 18)},
    ]


def test_predict_text(run: Run, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("predict", "sms", "hi", "a long text")
    assert code == 0
    assert [line.split()[-2:] for line in out.splitlines()[1:]] == [["ham", "0.5000"], ["spam", "0.7500"]]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\nthere, you\n")))
    code, out, _ = run("predict", "sms", "-")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["row", "0"], ["row", "1"]]
    assert len(server.asked(ModelInferRequest)) == 2


@pytest.mark.parametrize(("model", "rows"), [("mnist", 3), ("sms", 2)])
def test_predict_demo_chooses_the_sample(run: Run, model: str, rows: int) -> None:
    code, out, _ = run("predict", model, "--demo")
    assert code == 0
    assert len(out.splitlines()) == 1 + rows


def test_predict_without_labels_prints_the_outputs(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[1.5, 2.5]], "f4"))
    code, out, _ = run("predict", "echo_FP32", str(tmp_path / "x.npy"))
    assert (code, out) == (0, "y float32 [1, 2]\n[[1.5 2.5]]\n")
    code, out, _ = run("predict", "echo_FP32", str(tmp_path / "x.npy"), "--json")
    assert json.loads(out) == {"model": "echo_FP32", "outputs": {"y": [[1.5, 2.5]]}}


def test_the_servers_doubts_are_one_line(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([7.0], "f4"))
    code, out, err = run("predict", "doubtful", str(tmp_path / "x.npy"))
    assert (code, out) == (0, "y float32 [1]\n[0.]\n")
    assert err == "layercast: InputWarning: input 'x': want values from 0 to 1, got 0 to 7\n"


def test_features_table_and_file(run: Run, server: Any, tmp_path: Path) -> None:
    code, out, _ = run("features", "mnist", digit(7), "--layers", "net.0", "net.2@max", "--reduce", "mean")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["layer", "shape", "dtype", "mean"],
        ["net.0@mean", "[1,", "3]", "float16", "1"],
        ["net.2@max", "[1,", "3]", "float16", "1"],
    ]
    assert list(server.asked(ExtractRequest)[0].layers) == ["net.0@mean", "net.2@max"]
    target = tmp_path / "out.npz"
    code, out, _ = run("features", "mnist", digit(7), "--layers", "net.0", "--output", str(target))
    assert (code, out) == (0, f"1 layers of 1 rows in {target}\n")
    with np.load(target) as saved:
        assert {name: saved[name].tolist() for name in saved} == {"net.0": [[0, 1, 2]]}
    assert list(tmp_path.iterdir()) == [target]


def test_features_json(run: Run) -> None:
    code, out, _ = run("features", "mnist", digit(7), "--layers", "net.0", "--json")
    assert code == 0
    assert json.loads(out) == {"net.0": {"shape": [1, 3], "dtype": "float16", "mean": 1.0}}


def test_layers(run: Run) -> None:
    code, out, _ = run("layers", "mnist")
    assert code == 0
    assert out.splitlines()[1].split() == ["net.0", "Linear", "[N,", "512]", "FP32", "401,920"]
    assert out.splitlines()[2].endswith("not available: never runs")
    code, out, _ = run("layers", "mnist", "net.0", "--json")
    assert [layer["path"] for layer in json.loads(out)] == ["net.0"]


def test_models_and_terminal_escapes(run: Run) -> None:
    code, out, _ = run("models")
    assert code == 0
    assert out.splitlines()[1].split() == ["mnist", "1", "UNAVAILABLE", "weights", "differ\\x1b[31m"]
    code, out, _ = run("models", "--json")
    assert [model["version"] for model in json.loads(out)] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["predict", "unknown", digit(7)], "Request for unknown model: 'unknown' is not found"),
        (["predict", "mnist", "missing.png"], "missing.png: No such file"),
        (["predict", "mnist"], "nothing to send to model 'mnist': name an input, or pass --demo"),
        (["predict", "mnist", digit(7), "--demo"], "--demo brings its own input"),
        (["predict", "pair", "--demo"], "there is no sample for model 'pair'"),
        (["models", "--url", "http://x/v2"], "write host:port"),
        (["models", "--url", "localhost:1", "--timeout", "5"], "no server answers at localhost:1; start one with"),
        (["features", "mnist", digit(7), "--layers", "a", "--output", "/nowhere/x.npz"], "No such file"),
    ],
)
def test_bad_data_and_server_errors_are_one_line(run: Run, arguments: list[str], text: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("layercast: ")
    assert text in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["prdict"], "no verb 'prdict'; did you mean predict?"),
        (["predict"], "required: model"),
        (["predict", "mnist", "--top", "0"], "0 is not positive"),
        (["models", "--timeout", "-1"], "not a positive number of seconds"),
        (["features", "mnist", "x"], "required: --layers"),
    ],
)
def test_bad_arguments_exit_with_2(run: Run, arguments: list[str], text: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert text in err


def test_help_and_version(run: Run) -> None:
    code, out, _ = run()
    assert (code, run("--help")) == (0, (0, out, ""))
    assert all(f"  {verb} " in out for verb in program.COMMANDS)
    assert run("predict", "--help")[0] == 0
    assert run("--version")[1].startswith("layercast ")


def stand_in(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the module of a verb fail on import as the given error does."""

    def fail(name: str) -> Any:
        raise error

    monkeypatch.setattr(program, "importlib", SimpleNamespace(import_module=fail))


@pytest.mark.parametrize(("package", "extra"), [("torch", "server"), ("onnx", "export"), ("rich.table", "server")])
def test_a_missing_extra_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, package: str, extra: str) -> None:
    stand_in(monkeypatch, ModuleNotFoundError(f"No module named {package!r}", name=package))
    code, _, err = run("serve")
    assert (code, err) == (
        1,
        f"layercast: serve needs {package.partition('.')[0]}: pip install 'layercast[{extra}]'\n",
    )


def test_interrupts_and_bugs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, KeyboardInterrupt())
    assert run("serve")[0] == 130
    stand_in(monkeypatch, ModuleNotFoundError("No module named 'layercast.x'", name="layercast.x"))
    with pytest.raises(ModuleNotFoundError):
        run("serve")
    stand_in(monkeypatch, ValueError("several\nlines"))
    assert run("serve") == (1, "", "layercast: several lines\n")
    monkeypatch.setenv("LAYERCAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="several"):
        run("serve")


def test_a_reader_that_leaves_is_no_error(server: Any) -> None:
    code = "import sys; from layercast.client.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "models", "--url", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_the_client_is_light() -> None:
    program_text = (
        "import sys, layercast.client, layercast.client.main, layercast.client.commands.predict\n"
        "from layercast.client.commands import embed, explain, features\n"
        "heavy = {'torch', 'PIL', 'matplotlib', 'pyarrow', 'pydantic', 'prometheus_client', 'onnxruntime', 'layercast.server',"
        " 'layercast.models'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program_text], check=True)
    help_text = (
        "import sys, layercast.client, layercast.client.main as program\n"
        "assert program.main(['--help']) == 0\n"
        "heavy = {'grpc', 'numpy', 'google.protobuf'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from layercast.client import Client, InputWarning, LayerInfo\n"
        "assert set(layercast.client.__all__) == set(dir(layercast.client))\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", help_text], check=True, stdout=subprocess.DEVNULL)
