"""A directory of pictures whose rows are known, and what the client makes of it."""

from pathlib import Path
from typing import Any

import numpy as np

FILES = 30


def write(root: Path) -> None:
    """Write pictures of one grey each, 2 to 60, in folders."""
    from PIL import Image

    for number in range(FILES):
        path = root / f"{number % 3}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 2 * number + 2).save(path)


def arguments(catalogue: Path, output: Path, *more: Any) -> list[Any]:
    return ["embed", "gallery", catalogue, "--layer", "net.0@mean", "--output", output, *more]


def expected(catalogue: Path) -> tuple[list[str], np.ndarray]:
    """Paths in order, and the grey of each file's name."""
    paths = sorted(path.relative_to(catalogue).as_posix() for path in catalogue.rglob("*.png"))
    greys = [(2 * int(Path(path).stem) + 2) / 255 for path in paths]
    return paths, np.array([[grey, grey] for grey in greys], "f4")


def check(output: Path, catalogue: Path) -> None:
    paths, values = expected(catalogue)
    with np.load(output) as saved:
        assert saved["paths"].tolist() == paths
        np.testing.assert_allclose(saved["values"], values, rtol=1e-6)
        assert [str(saved[name]) for name in ("model", "version", "layer")] == ["gallery", "2", "net.0@mean"]
