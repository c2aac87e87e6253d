"""What all processes of one run of tests share: the workers, the servers that they start, and pytests of their own."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

if not os.environ.get("LAYERCAST_TEST_RUN"):
    _OWN = tempfile.TemporaryDirectory(prefix="layercast-tests-")  # removed when this process, the first one, ends
    os.environ["LAYERCAST_TEST_RUN"] = _OWN.name
_FOLDER = Path(os.environ["LAYERCAST_TEST_RUN"])


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of that name, which the first process that asks has `make` fill; others wait for it."""
    folder, unfinished = _FOLDER / name, _FOLDER / f"{name}.unfinished"
    with (_FOLDER / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)  # of one that failed
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


def cache() -> Path:
    """Return where servers remember choices of engines, to be called at each start; it isn't that of who runs the tests.

    What was timed on a busy machine would be timed again at the next starts, and one that runs tests is always busy:
    to tests whose subject is something else, the first choice is as good.
    """
    folder = _FOLDER / "cache"
    for path in folder.glob("engines/*.json"):
        with suppress(FileNotFoundError):  # of many files the oldest go
            content = json.loads(path.read_bytes())
            if content["busy_starts"]:
                content["busy_starts"] = 0
                with tempfile.NamedTemporaryFile("w", dir=_FOLDER, delete=False) as file:
                    json.dump(content, file)
                os.replace(file.name, path)
    return folder
