"""What an export refuses: values, sizes and operators that a program would not carry over, each by its module's name."""

import faulty_modules as faulty
import pytest
import torch
from conftest import card_of
from torch import nn

from layercast.models.export.checks import ExportError
from layercast.models.export.writer import export_artefact


def refusal(fault: type[nn.Module], program: str, directory) -> str:
    card = {**card_of("shared"), "architecture": "faulty_modules:Holder", "arguments": {"fault": fault.__name__}}
    torch.manual_seed(0)
    with pytest.raises(ExportError) as caught:
        export_artefact(faulty.Holder(fault.__name__).eval(), card, directory / "m" / "1", programs=(program,))
    assert list(directory.glob("m/*")) == [], "nothing may be left"
    return str(caught.value)


@pytest.mark.parametrize("program", ["torchscript", "onnx", "exported"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (faulty.CustomOperator, "custom operator layercast_tests::double"),
        (faulty.RareBranch, ""),
        (faulty.ItemBranch, ""),
        (faulty.MeanBranch, "depends on the other rows"),
        (faulty.FrozenBatch, ""),
        (faulty.RowsByList, ""),
        (faulty.ThroughNumpy, ""),
        (faulty.Random, "same rows come again"),
        (faulty.WithState, "same rows come again"),
        (faulty.NeedsMoreRows, "at batch 1.*Expected more than 1 value"),
    ],
    ids=lambda value: getattr(value, "__name__", "-"),
)
def test_what_a_program_would_not_carry_over_is_refused_by_its_name(tmp_path, program, fault, message):
    text = refusal(fault, program, tmp_path)
    assert f"'net.1' ({fault.__name__})" in text
    assert message.partition(".*")[0] in text
    assert message.rpartition(".*")[2] in text


@pytest.mark.parametrize(
    ("fault", "program", "message"),
    [
        (faulty.RareBranch, "torchscript", "would freeze what it saw"),
        (faulty.ItemBranch, "torchscript", "would freeze what it saw"),
        (faulty.ThroughNumpy, "torchscript", "would freeze what it saw"),
        (faulty.FrozenBatch, "exported", "takes the batch size or a length as a constant"),
        (faulty.RareBranch, "exported", "branch on values"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_refusal_says_what_is_wrong(tmp_path, fault, program, message):
    assert message in refusal(fault, program, tmp_path)


def test_an_operator_that_onnx_lacks_is_named_with_its_caller(tmp_path):
    text = refusal(faulty.Untranslatable, "onnx", tmp_path)
    assert "ONNX opset 20 has nothing for the operator" in text
    assert "bessel_j0, which module 'net.1' (Untranslatable) calls" in text
