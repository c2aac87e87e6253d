"""ResNetLike against a reference without in-place operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layercast.models.architectures.resnet import ResNetLike


def residual_stage(x: Tensor, w: dict[str, Tensor], prefix: str, stride: int, training: bool) -> Tensor:
    def norm(value: Tensor, name: str) -> Tensor:
        mean, var = w[f"{prefix}{name}.running_mean"].clone(), w[f"{prefix}{name}.running_var"].clone()
        return F.batch_norm(value, mean, var, w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"], training)

    out = F.relu(norm(F.conv2d(x, w[f"{prefix}conv1.weight"], stride=stride, padding=1), "bn1"))
    out = norm(F.conv2d(out, w[f"{prefix}conv2.weight"], padding=1), "bn2")
    if f"{prefix}se.squeeze.weight" in w:
        gate = F.linear(out.mean((2, 3)), w[f"{prefix}se.squeeze.weight"], w[f"{prefix}se.squeeze.bias"])
        gate = F.linear(F.relu(gate), w[f"{prefix}se.excite.weight"], w[f"{prefix}se.excite.bias"])
        out = out * torch.sigmoid(gate)[:, :, None, None]
    if f"{prefix}shortcut.0.weight" in w:
        x = norm(F.conv2d(x, w[f"{prefix}shortcut.0.weight"], stride=stride), "shortcut.1")
    return F.relu(out + x)


class TestResNetLike:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("squeeze", [True, False])
    def test_equals_an_out_of_place_reference(self, squeeze: bool, training: bool) -> None:
        torch.manual_seed(1)
        model = ResNetLike(5, squeeze).double().train(training)
        w = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        image = torch.rand(3, 3, 9, 8, dtype=torch.float64)
        mean, variance = w["bn.running_mean"].clone(), w["bn.running_var"].clone()
        x = F.conv2d(image, w["stem.weight"], padding=1)
        x = F.relu(F.batch_norm(x, mean, variance, w["bn.weight"], w["bn.bias"], training))
        for name, stride in (("layer1.0.", 1), ("layer1.1.", 1), ("layer2.0.", 2), ("layer2.1.", 1)):
            x = residual_stage(x, w, name, stride, training)
        torch.testing.assert_close(model(image), F.linear(x.mean((2, 3)), w["head.weight"], w["head.bias"]))

    def test_parameters_by_hand(self) -> None:
        # stem 1,728 + 128; two blocks of 73,984; 230,144 with a shortcut and 295,424 without; head 1,290
        assert sum(p.numel() for p in ResNetLike().parameters()) == 1856 + 2 * 73_984 + 230_144 + 295_424 + 1290
        # 64 -> 4 -> 64 twice, 128 -> 8 -> 128 twice
        more = sum(p.numel() for p in ResNetLike(squeeze_excitation=True).parameters()) - 676_682
        assert more == 2 * (64 * 4 + 4 + 4 * 64 + 64) + 2 * (128 * 8 + 8 + 8 * 128 + 128)

    def test_convolutions_start_kaiming_normal(self) -> None:
        torch.manual_seed(0)
        weight = ResNetLike().layer2[0].conv1.weight
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.02)  # 64 come in, 128 go out

    def test_sizes_of_maps(self) -> None:
        model, shapes = ResNetLike(3).eval(), []
        for stage in (model.layer1, model.layer2):
            stage.register_forward_hook(lambda _, __, output: shapes.append(list(output.shape)))
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, 3)
        assert shapes == [[1, 64, 32, 32], [1, 128, 16, 16]]
