"""A file that is no installed module: networks with everything that makes hooks go wrong. Input `x`, output `y`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InPlace(nn.Module):
    """What a module returned is changed afterwards: by a module, by an operator, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.skip, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.tanh = nn.Hardtanh(inplace=True)
        self.kept, self.pool = nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.norm(self.conv(x)))
        out += self.skip(x)
        out = self.last(out)
        out[:, 0] = 0
        out = self.tanh(out)
        kept: Tensor = self.kept(out)
        return self.pool(kept).flatten(1)


class Parts(nn.Module):
    """Modules that return tuples, lists and dicts of tensors, with things that are none in between."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, object]]:
            y = self.inner(x)
            return y, {"halves": [y[:, :3], y[:, 3:]], "count": 2, "none": None}

    def __init__(self) -> None:
        super().__init__()
        self.split, self.lstm, self.head = self.Split(), nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        _, parts = self.split(x)
        states, _ = self.lstm(torch.stack(parts["halves"], 1))
        y: Tensor = self.head(states[:, -1])
        return y


class Again(nn.Module):
    """A module called three times, one inside a module that is called twice, and one that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True))
        self.step, self.same = nn.Linear(6, 6), nn.Linear(6, 6)
        self.alias = self.same

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(x))
        for _ in range(3):
            x = torch.tanh(self.step(x))
        y: Tensor = self.alias(self.same(x))
        return y


class Tied(nn.Module):
    """Embedding and head share their weight, and the head's is used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.linear(self.norm(self.embed(x)), self.embed.weight.t()))
        return y


class Strided(nn.Module):
    """What modules return is transposed, sliced, expanded, in channels_last; nothing lies in one piece."""

    class View(nn.Module):
        def __init__(self, how: int) -> None:
            super().__init__()
            self.how = how

        def forward(self, x: Tensor) -> Tensor:
            views = (
                x.transpose(1, 2), x[:, ::2, 1:], x[:, :1].expand(-1, 5, -1, -1), x.permute(0, 2, 3, 1), x.flip(1)[:, 1:]
            )  # fmt: skip
            return views[self.how]

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.views = nn.ModuleList(self.View(how) for how in range(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.contiguous(memory_format=torch.channels_last))
        return torch.stack([view(y).mean((1, 2, 3)) for view in self.views], 1)


class Fused(nn.Module):
    """torch's own encoder, which computes without calling the modules inside, and one that it can't."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        post = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        pre = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu")
        self.post = nn.TransformerEncoder(post, 2)
        self.pre = nn.TransformerEncoder(pre, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pre(self.post(self.embed(x)))
        return y.mean(1)


class Mobile(nn.Module):
    """As torchvision and timm write them: depthwise, squeeze-and-excitation, in-place activations, dropped paths."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.reduce, self.act = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.SiLU(inplace=True)
            self.expand, self.gate = nn.Conv2d(2, 8, 1), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        )
        self.gate, self.project, self.drop_path = self.Gate(), nn.Conv2d(8, 8, 1), nn.Identity()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.drop_path(self.project(self.gate(self.depthwise(x))))
        y: Tensor = self.head(x)
        return y


class Vision(nn.Module):
    """A pre-norm vision transformer: class token, fused attention as a function, scaled branches."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.norm2, self.fc1, self.act, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
            self.scale = nn.Parameter(torch.full((8,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            rows, length, width = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(rows, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, length, width)
            x = x + self.proj(attended) * self.scale
            return x + self.fc2(self.act(self.fc1(self.norm2(x)))).mul_(self.scale)

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.norm(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), patches], 1)))[:, 0])
        return y


class Aside(nn.Module):
    """A module whose parent calls its `forward` and not the module, so that no hook can see it, and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.around, self.seen, self.unused = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.seen(self.around.forward(x))
        return y


SHAPES = {
    "InPlace": (3, 8, 8), "Parts": (6,), "Again": (6,), "Tied": (6,), "Strided": (3, 6, 6), "Fused": (5, 6),
    "Mobile": (3, 8, 8), "Vision": (3, 8, 8), "Aside": (6,),
}  # fmt: skip
