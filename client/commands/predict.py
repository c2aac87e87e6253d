"""`layercast predict MODEL INPUT ...`: what a model says about pictures, arrays or texts."""

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from layercast.client.client import Client
from layercast.client.commands.common import (
    add_input_arguments,
    add_server_arguments,
    chosen_inputs,
    connect,
    positive,
    print_json,
    print_table,
    row_names,
    shape_text,
)
from layercast.client.preprocess import prepare
from layercast.client.types import ModelMetadata
from layercast.proto.codec import AnyArray


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_input_arguments(parser)
    parser.add_argument("--top", type=positive, default=1, metavar="K", help="labels to show for each input (1)")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Send all inputs, in batches; print the most probable labels, or the raw outputs of a model without labels."""
    with connect(arguments) as client:
        metadata = client.metadata(arguments.model, version=arguments.version)
        sources = chosen_inputs(arguments, metadata)
        batch = prepare(sources, metadata)
        outputs = _predict(client, arguments, metadata, batch)
    names = row_names(sources, len(batch))
    logits = _logits(outputs, metadata)
    if logits is not None:
        _print_labels(arguments, metadata, names, probabilities(logits))
    elif arguments.json:
        print_json({"model": metadata.name, "outputs": {name: array.tolist() for name, array in outputs.items()}})
    else:
        for name, array in outputs.items():
            print(f"{name} {array.dtype} {shape_text(array.shape)}")
            print(np.array2string(array, threshold=50, precision=4, suppress_small=True))
    return 0


def probabilities(logits: AnyArray) -> NDArray[np.float64]:
    """Softmax over the last axis."""
    values = logits.astype(np.float64)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = powers / powers.sum(axis=-1, keepdims=True)
    return result


def _predict(
    client: Client, arguments: argparse.Namespace, metadata: ModelMetadata, batch: AnyArray
) -> dict[str, AnyArray]:
    """All outputs by name. More rows than the server takes at once go in several requests, over one stream."""
    limit = metadata.properties.get("max_batch", "")
    size = int(limit) if limit.isdecimal() and int(limit) > 0 else len(batch)
    names = [output.name for output in metadata.outputs]
    if size >= len(batch):
        return client.predict(arguments.model, batch, version=arguments.version, outputs=names)
    parts = (batch[start : start + size] for start in range(0, len(batch), size))
    answers = list(client.predict_many(arguments.model, parts, version=arguments.version, outputs=names))
    return {name: np.concatenate([answer[name] for answer in answers]) for name in names}


def _logits(outputs: Mapping[str, AnyArray], metadata: ModelMetadata) -> AnyArray | None:
    """The output that the labels belong to, if there is one."""
    for array in outputs.values():
        if metadata.labels and array.ndim == 2 and array.shape[1] == len(metadata.labels) and array.dtype.kind == "f":
            return array
    return None


def _print_labels(
    arguments: argparse.Namespace, metadata: ModelMetadata, names: list[str], rows: NDArray[np.float64]
) -> None:
    ranked = [_ranked(row, metadata.labels, arguments.top) for row in rows]
    if arguments.json:
        predictions = [
            {"input": name, "top": [{"label": label, "probability": probability} for label, probability in top]}
            for name, top in zip(names, ranked, strict=True)
        ]
        print_json({"model": metadata.name, "predictions": predictions})
        return
    cells = [
        (name if rank == 0 else "", label, f"{probability:.4f}")
        for name, top in zip(names, ranked, strict=True)
        for rank, (label, probability) in enumerate(top)
    ]
    print_table(("input", "label", "probability"), cells)


def _ranked(row: NDArray[np.float64], labels: Sequence[str], top: int) -> list[tuple[str, float]]:
    """The most probable labels, best first."""
    return [(labels[index], float(row[index])) for index in np.argsort(-row, kind="stable")[:top]]
