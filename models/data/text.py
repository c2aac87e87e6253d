"""Reader of labelled text, one `label TAB text` a line, as the UCI SMS Spam Collection is published."""

from pathlib import Path

import torch
from torch import Tensor

from layercast.models.data.dataset import DataError, Dataset, read_whole, stratified

PADDING = 256
_MOST_BYTES = 1 << 28
_LABELS = ("ham", "spam")
_TEST_FRACTION = 0.2
_SPLIT_SEED = 2012


def read_labelled(path: Path) -> tuple[list[str], list[str]]:
    """Return (labels, texts) of a UTF-8 file, with or without a byte-order mark, lines ending in LF or CRLF.

    Undecodable bytes become U+FFFD. DataError names a line without a tab, a label or a text, and a file that is not
    text.
    """
    content = read_whole(path, _MOST_BYTES)
    if b"\0" in content:
        raise DataError(f"{path.name}: want lines of text, got binary data; unpack it if it is an archive")
    labels, texts = [], []
    # Split at LF alone: messages hold other characters that str.splitlines would take for ends of lines.
    for number, line in enumerate(content.decode("utf-8-sig", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        label, tab, text = line.rstrip("\r").partition("\t")
        if not tab or not label.strip() or not text.strip():
            missing = "no tab" if not tab else "no label" if not label.strip() else "no text"
            raise DataError(f"{path.name}, line {number}: want `label TAB text`, got {missing}")
        labels.append(label.strip())
        texts.append(text)
    if not texts:
        raise DataError(f"{path.name}: want `label TAB text` lines, got none")
    return labels, texts


def encode(text: str, max_length: int) -> list[int]:
    """Return the first `max_length` UTF-8 bytes of `text` as token ids."""
    return list(text.encode("utf-8")[:max_length])


def tokenise(texts: list[str], max_length: int) -> Tensor:
    """Return int64 [N, max_length] tokens: the texts' bytes, padded with 256."""
    tokens = torch.full((len(texts), max_length), PADDING, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids = encode(text, max_length)
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return tokens


def load_sms_spam(directory: Path, max_length: int) -> Dataset:
    """Read the SMS Spam Collection and split it 80 : 20, seeded and stratified.

    Copies of one message (same text but for case and white space) are kept once, so none is on both sides.
    """
    path = directory / "SMSSpamCollection"
    labels, texts = read_labelled(path)
    if tuple(sorted(set(labels))) != _LABELS:
        raise DataError(f"{path.name}: want the labels ham and spam, got {', '.join(sorted(set(labels))[:5])}")
    unique: dict[str, int] = {}
    for row, text in enumerate(texts):
        unique.setdefault(" ".join(text.lower().split()), row)
    rows = list(unique.values())
    tokens = tokenise([texts[row] for row in rows], max_length)
    targets = torch.tensor([_LABELS.index(labels[row]) for row in rows])
    train, test = stratified(targets, _TEST_FRACTION, torch.Generator().manual_seed(_SPLIT_SEED))
    return Dataset(
        name="SMS Spam Collection",
        licence="CC BY 4.0",
        source="Almeida, Hidalgo: UCI SMS Spam Collection",
        labels=_LABELS,
        train_inputs=tokens[train],
        train_targets=targets[train],
        test_inputs=tokens[test],
        test_targets=targets[test],
    )
