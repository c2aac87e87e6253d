"""What torch.export.load would read from an archive by means that can run any code, found before it does."""

import io
import json
import re
import zipfile
from typing import Any, Final

from layercast.models import torch_files
from layercast.models.torch_files import TorchFileError

_SAMPLES: Final = re.compile(r"[^/]+/data/sample_inputs/[^/]+\.pt\Z")
_CONFIG: Final = re.compile(r"[^/]+/data/(?:weights|constants)/[^/]+_config\.json\Z")
_PLAIN: Final = re.compile(
    r"[^/]+/(?:archive_format|archive_version|byteorder|\.data/.+|models/[^/]+\.json|data/weights/weight_\d+|"
    r"data/constants/tensor_\d+)\Z"
)
"""Members that torch reads as text or as raw tensor bytes."""


def refuse_pickles(content: bytes) -> None:
    """Raise TorchFileError unless all that is pickled in the archive `content` is plain tensors.

    torch.export.load falls back to a reader that runs code for example inputs, weights and constants that need it, and
    for archives of older releases (torch 2.13).
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                if _SAMPLES.match(name):
                    torch_files.read(io.BytesIO(archive.read(name)), name, "cpu")
                elif _CONFIG.match(name):
                    if _says_pickle(json.loads(archive.read(name))):
                        raise TorchFileError(f"{name} says that tensors are pickled, which could run any code")
                elif not _PLAIN.match(name):
                    raise TorchFileError(f"the archive holds {name}, which is no part of a plain torch.export program")
    except zipfile.BadZipFile as error:
        raise TorchFileError(f"not a torch.export archive: {error}") from error


def _says_pickle(config: Any) -> bool:
    """Tell whether any entry, at any depth, has a true `use_pickle`."""
    if isinstance(config, dict):
        return bool(config.get("use_pickle")) or any(map(_says_pickle, config.values()))
    return isinstance(config, list) and any(map(_says_pickle, config))
