"""KServe's own client, unmodified, in its own environment, against a real server: gRPC and REST v2."""

from pathlib import Path

import numpy as np
import torch
from test_server_inference import offline
from test_tritonclient import run

SCRIPT = Path(__file__).parent / "kserve_script.py"


def test_kserves_client_gets_the_offline_answers_over_grpc_and_rest(served, modules, kserve_python, tmp_path):
    http = served.server.http_port
    said = run(kserve_python, served.url, f"http://127.0.0.1:{http}", str(tmp_path), script=SCRIPT)
    assert "KServe's client works" in said
    x = np.random.default_rng(0).random((3, 1, 28, 28), dtype="f4")
    for name in ("grpc", "binary", "json"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), offline(modules["mnist"], x), atol=1e-4)
    with torch.inference_mode():
        layer = modules["mnist"].net[0](torch.from_numpy(x).flatten(1)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "layer.npy"), layer, atol=1e-4)
