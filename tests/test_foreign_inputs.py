"""The syntax of `--example`, and the outputs that running a module tells."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from layercast.models.examples import Examples
from layercast.models.export.checks import ExportError
from layercast.models.export.positional import named_outputs
from layercast.models.foreign.inputs import InputFault, parse_inputs
from layercast.models.foreign.outputs import derive_outputs

Pair = namedtuple("Pair", "logits hidden")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("image:float32[2,3,224,224]", ("image", "FP32", (-1, 3, 224, 224), None, None, None)),
        ("x:torch.half[N]", ("x", "FP16", (-1,), None, None, None)),
        ("x : np.int32 [ 2 , 7 ] { -3 .. 4 }", ("x", "INT32", (-1, 7), (-3, 4), None, None)),
        ("x:BF16[?,T,3]", ("x", "BF16", (-1, -1, 3), None, None, None)),
        ("x:float[2,H<=64,W<=64]{-1.5..1e2}", ("x", "FP32", (-1, -1, -1), (-1.5, 100), None, 64)),
        ("t:int64[2,T<=128]{0..30521}", ("t", "INT64", (-1, -1), (0, 30521), None, 128)),
        ("t:long[2,-1<=9]{0..5 pad 5}", ("t", "INT64", (-1, -1), (0, 5), 5, 9)),
        ("m:bool[2,T]{mask}", ("m", "BOOL", (-1, -1), (0, 1), 0, None)),
    ],
)
def test_an_input_is_what_its_text_says(text, wanted):
    (spec,) = parse_inputs([text])
    assert (spec.name, spec.datatype, spec.shape, spec.range, spec.pad, spec.max_length) == wanted


def test_inputs_of_one_dynamic_size_share_its_bound():
    specs = parse_inputs(["tokens:int64[2,T<=12]", "mask:int64[2,T]", "bias:float32[2,?,4]", "image:float32[2,3,8]"])
    assert [spec.max_length for spec in specs] == [12, 12, 12, None]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["image"], "want NAME:DTYPE"),
        (["a b:int64[2]"], "want NAME:DTYPE"),
        (["x:float32[2,3"], "want NAME:DTYPE"),
        (["x:float32[]"], "begin with the batch"),
        (["x:float32[2,0]"], "'0' is no size"),
        (["x:float32[2,3.5]"], "'3.5' is no size"),
        (["x:float32[2,,3]"], "'nothing' is no size"),
        (["x:flaot32[2]"], "no datatype 'flaot32'; nearest: float32"),
        (["x:BYTES[2]"], "no datatype 'BYTES'"),
        (["x:int64[2]{5..1}"], "end before they begin"),
        (["x:int64[2]{0..1.5}"], "whole values only"),
        (["x:int64[2]{0-5}"], "want values"),
        (["x:int64[2,T]{0..5 pad 6}"], "padding value must be one of"),
        (["x:float32[2,T]{0..5 pad 1}"], "padding value must be one of"),
        (["x:int64[2,3,T]{mask}"], "two dimensions"),
        (["x:int64[2]", "x:int64[2]"], "x is described twice"),
        (["x:int64[2,T,T]"], "T stands in two places"),
        (["x:int64[2,T,3]", "y:int64[2,3,T]"], "T stands in two places"),
        (["x:int64[2,T]", "y:int64[2,S]"], "S and T stand in the same place"),
        (["x:int64[2,T<=4]", "y:int64[2,T<=5]"], "bounded by 4 and by 5"),
        (["x:float32[2,H<=4,W]"], "the same bound"),
    ],
)
def test_a_wrong_input_is_quoted_with_what_was_wanted(texts, message):
    with pytest.raises(InputFault, match=message):
        parse_inputs(texts)


@pytest.mark.parametrize("kind", ["random", "zeros", "low", "high"])
def test_examples_of_a_mask_never_hide_a_whole_row(kind):
    examples = Examples(parse_inputs(["mask:int64[2,T<=9]{mask}"]))
    seen = [examples.make(6, length, kind)["mask"] for length in (1, 5, 9)]
    assert all((mask[:, 0] == 1).all() for mask in seen)
    assert all(set(mask.unique().tolist()) <= {0, 1} for mask in seen)
    assert kind != "random" or (seen[2] == 0).any()


@dataclass
class Result:
    score: Tensor
    state: Tensor | None
    cache: object


class Returning(nn.Module):
    """Returns what `form` makes of its input."""

    def __init__(self, form) -> None:
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


FORMS = {
    "tensor": (lambda x: x * 2, {"output": (-1, -1, 4)}, 0),
    "tuple": (lambda x: (x.sum((1, 2)), x), {"output_0": (-1,), "output_1": (-1, -1, 4)}, 0),
    "tuple with None and parts": (
        lambda x: (x.mean(1), None, [x], x.argmax(1)),
        {"output_0": (-1, 4), "output_3": (-1, 4)},
        1,
    ),
    "named tuple": (lambda x: Pair(x.mean(1), x), {"logits": (-1, 4), "hidden": (-1, -1, 4)}, 0),
    "dict": (lambda x: {"b": x, "a": x.mean(1), "loss": x.sum(), "none": None}, {"b": (-1, -1, 4), "a": (-1, 4)}, 1),
    "dataclass": (lambda x: Result(x.mean(1), None, {"k": x}), {"score": (-1, 4)}, 1),
    "complex values": (lambda x: {"a": x, "f": torch.fft.fft(x)}, {"a": (-1, -1, 4)}, 1),
    "rows side by side": (lambda x: {"a": x, "t": x.mean(1) @ x.mean(1).T}, {"a": (-1, -1, 4)}, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_found_by_running_the_module(form):
    function, shapes, left_out = FORMS[form]
    module = Returning(function).eval()
    examples = Examples(parse_inputs(["x:float32[2,T,4]"]))
    derived = derive_outputs(module, examples)
    assert {spec.name: spec.shape for spec in derived.outputs} == shapes
    assert len(derived.left_out) == left_out
    x = examples.make(3)["x"]
    result = function(x)
    got = named_outputs(module(x), list(shapes))
    for name in shapes:  # each under the name of the entry it came from
        if name.startswith("output_"):
            assert torch.equal(got[name], result[int(name.removeprefix("output_"))])
        elif name != "output":
            assert torch.equal(got[name], result[name] if isinstance(result, dict) else getattr(result, name))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: "text", "the model returned str"),
        (lambda x: x.sum(), r"output left out: its shape is \[\] at batch 2, length 10"),
        (
            lambda x: {"a": x, **({"b": x} if len(x) > 2 else {})},
            r"returns \['a'\] at batch 2.*\['a', 'b'\] at batch 3",
        ),
        (
            lambda x: x[:, :4].reshape(-1, 16),
            r"Returning itself fails on the example at batch 2, length 1: RuntimeError",
        ),
    ],
)
def test_what_cannot_be_served_says_why(form, message):
    with pytest.raises(ExportError, match=message):
        derive_outputs(Returning(form).eval(), Examples(parse_inputs(["x:float32[2,T,4]"])))
