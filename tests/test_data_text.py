"""Labelled text, its tokens, and the split of the SMS Spam Collection."""

from pathlib import Path

import pytest
import torch

from layercast.models.data import DataError, stratified
from layercast.models.data.text import PADDING, encode, load_sms_spam, read_labelled, tokenise


@pytest.mark.parametrize(
    ("content", "labels", "texts"),
    [
        (b"ham\thello\nspam\tWIN\n", ["ham", "spam"], ["hello", "WIN"]),
        (b"ham\thello\r\nspam\tWIN", ["ham", "spam"], ["hello", "WIN"]),
        (b"\xef\xbb\xbfham\thello\n\n  \n", ["ham"], ["hello"]),
        (b"ham\ta\tb\n", ["ham"], ["a\tb"]),
        ("ham\tcosts £1 a\x85b\u2028c\n".encode(), ["ham"], ["costs £1 a\x85b\u2028c"]),
        (b"ham\tcosts \xa31\n", ["ham"], ["costs \ufffd1"]),
    ],
    ids=["plain", "crlf", "byte-order mark and blank lines", "tab in the text", "odd line separators", "not utf-8"],
)
def test_lines_are_split_as_they_are_published(tmp_path: Path, content: bytes, labels: list[str], texts: list[str]):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert read_labelled(path) == (labels, texts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "want `label TAB text` lines, got none"),
        (b"ham\tok\nno tab here\n", "line 2: want `label TAB text`, got no tab"),
        (b"\ttext\n", "line 1: .*no label"),
        (b"ham\t \n", "line 1: .*no text"),
        (b"PK\x03\x04\0\0", "binary data; unpack it"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "SMSSpamCollection"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"SMSSpamCollection.*{message}"):
        read_labelled(path)


def test_tokens_are_bytes_padded_and_cut():
    assert encode("aé", 10) == [97, 0xC3, 0xA9]
    assert encode("aé", 2) == [97, 0xC3]
    assert tokenise(["abc", "", "abcdef"], 4).tolist() == [
        [97, 98, 99, PADDING],
        [PADDING] * 4,
        [97, 98, 99, 100],
    ]


def messages(ham: int, spam: int) -> str:
    return "".join(f"ham\tsee you at {n}\n" for n in range(ham)) + "".join(f"spam\tWin {n} now\n" for n in range(spam))


def as_texts(tokens: torch.Tensor) -> set[bytes]:
    return {bytes(byte for byte in row if byte != PADDING) for row in tokens.tolist()}


def test_the_split_is_stratified_seeded_and_keeps_copies_on_one_side(tmp_path: Path):
    copies = "ham\tSEE  you at 3\nham\tsee you\tat 3\nspam\twin 5 NOW\n"
    (tmp_path / "SMSSpamCollection").write_text(messages(100, 20) + copies)
    data, again = load_sms_spam(tmp_path, 32), load_sms_spam(tmp_path, 32)
    assert data.labels == ("ham", "spam")
    assert torch.bincount(data.train_targets).tolist() == [80, 16]
    assert torch.bincount(data.test_targets).tolist() == [20, 4]
    train, test = as_texts(data.train_inputs), as_texts(data.test_inputs)
    assert len(train) + len(test) == 120
    assert not {b" ".join(text.lower().split()) for text in train} & {b" ".join(text.lower().split()) for text in test}
    assert torch.equal(data.test_inputs, again.test_inputs)
    assert data.fingerprint() == again.fingerprint()


def test_other_labels_are_refused(tmp_path: Path):
    (tmp_path / "SMSSpamCollection").write_text("good\ta\nbad\tb\n")
    with pytest.raises(DataError, match="want the labels ham and spam, got bad, good"):
        load_sms_spam(tmp_path, 32)


def test_stratified_holds_out_the_same_share_of_every_class():
    targets = torch.tensor([0] * 10 + [1] * 40 + [2] * 2 + [3])
    kept, held = stratified(targets, 0.1, torch.Generator().manual_seed(3))
    assert torch.bincount(targets[held], minlength=4).tolist() == [1, 4, 1, 0]
    assert torch.cat([kept, held]).sort().values.tolist() == list(range(53))
    again = stratified(targets, 0.1, torch.Generator().manual_seed(3))[1]
    other = stratified(targets, 0.1, torch.Generator().manual_seed(4))[1]
    assert torch.equal(held, again)
    assert not torch.equal(held, other)


def test_stratified_refuses_to_hold_out_nothing():
    with pytest.raises(DataError, match="at least two rows of some class"):
        stratified(torch.tensor([0, 1, 2]), 0.5, torch.Generator())


def test_the_fingerprint_tells_data_apart(tmp_path: Path):
    path = tmp_path / "SMSSpamCollection"
    path.write_text(messages(10, 5))
    before = load_sms_spam(tmp_path, 32).fingerprint()
    path.write_text(messages(10, 5).replace("you", "her"))
    assert load_sms_spam(tmp_path, 32).fingerprint() != before
