"""The file at the end: .npz for numpy, or Parquet. The same rows give the same bytes."""

import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layercast.client.embedding.parts import Form
from layercast.client.errors import InputError
from layercast.client.files import replacing
from layercast.proto.codec import AnyArray

FORMATS = (".npz", ".parquet")

Groups = Iterable[tuple[list[str], AnyArray]]


def check_form(form: Form, path: Path) -> None:
    """Raise InputError, before the work is done, for rows that the format does not hold."""
    if path.suffix == ".parquet" and len(form.shape) != 1:
        raise InputError(
            f"a row of this layer is {list(form.shape)}, a column of Parquet holds vectors: reduce it by @mean or "
            "@flatten, or write .npz"
        )
    if form.dtype.kind not in "biuf":
        raise InputError(f"the layer's values are {form.dtype}, no numbers that a file could hold")


def write(path: Path, groups: Groups, paths: list[str], form: Form, about: Mapping[str, str]) -> None:
    """Write the rows; `paths` are those of all groups in turn, `about` says which model, version and layer."""
    if path.suffix == ".parquet":
        _write_parquet(path, groups, form, about)
    else:
        _write_npz(path, groups, paths, form, about)


def _write_npz(path: Path, groups: Groups, paths: list[str], form: Form, about: Mapping[str, str]) -> None:
    """As np.savez would, but a group at a time."""
    header = {
        "descr": np.lib.format.dtype_to_descr(form.dtype),
        "fortran_order": False,
        "shape": (len(paths), *form.shape),
    }
    small: dict[str, AnyArray] = {"paths": np.array(paths), **{name: np.array(text) for name, text in about.items()}}
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        with archive.open("values.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for _, values in groups:
                member.write(values.tobytes())


def _write_parquet(path: Path, groups: Groups, form: Form, about: Mapping[str, str]) -> None:
    import pyarrow as arrow
    from pyarrow import parquet

    number = arrow.from_numpy_dtype(form.dtype)
    size = math.prod(form.shape)
    fields: list[tuple[str, Any]] = [("path", arrow.string()), *((name, arrow.string()) for name in about)]
    schema = arrow.schema([*fields, ("values", arrow.list_(number, size))])
    with replacing(path) as file, parquet.ParquetWriter(file, schema) as writer:
        for paths, values in groups:
            columns = [arrow.array(paths), *(arrow.array([text] * len(paths)) for text in about.values())]
            rows = arrow.FixedSizeListArray.from_arrays(arrow.array(values.reshape(-1)), size)
            writer.write_table(arrow.table([*columns, rows], schema=schema), row_group_size=len(paths))
