"""Names in the file: each stream's codes are found under the stream's own name, also around a pooling."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from galago.deploy import onnx
from galago.deploy.integer import lower
from galago.deploy.look import Codes, look_into_integer
from galago.deploy.runtime import OnnxRuntime
from galago.probe import Deployed
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from samples import Stripes


class Pooled(nn.Module):
    """A convolution, a pooling and a fork behind it, as a ResNet begins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.body, self.end = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.conv(x)))
        scores: Tensor = self.head(self.end(x + self.body(x)).mean((2, 3)))
        return scores


def looked_into(network: nn.Module, folder: Path) -> tuple[Codes, Codes]:
    """Codes of every stream of a network quantized to 8 bits: in the integer module, and in its file."""
    data = Stripes()
    net = Quantize(MinMaxWeight(), MinMax(), stream=MinMax()).prepare(network, data).eval()
    deployed = Deployed(lower(net, data.normalize(data.example())), data.normalize, Classify(2)).eval()
    path = onnx.export(deployed, data.example(), folder / "model.onnx")
    image = data.validation()[0].input
    with torch.inference_mode():
        return look_into_integer(deployed, image)[1], OnnxRuntime(path).look(image)[1]


def test_a_poolings_stream_is_what_it_gives_and_not_what_it_reads(tmp_path: Path) -> None:
    expected, found = looked_into(Pooled(), tmp_path)
    assert {"act.stream", "pool.stream"} <= expected.keys()
    for name, codes in expected.items():
        assert found[name].shape == codes.shape, name
        assert (found[name].int() - codes.int()).abs().max() <= 1, name


class Twice(nn.Module):
    """A tensor that is pooled twice, by two modules, as in DLA."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.pool, self.again = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.body, self.end, self.last = nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        one, two = self.pool(x), self.again(x)
        scores: Tensor = self.head(self.last(torch.cat([self.end(one + self.body(one)), two], 1)).mean((2, 3)))
        return scores


def test_streams_that_the_exporter_makes_one_are_found_under_both_names(tmp_path: Path) -> None:
    expected, found = looked_into(Twice(), tmp_path)
    assert {"pool.stream", "again.stream"} <= expected.keys() == found.keys()
    assert torch.equal(found["pool.stream"], found["again.stream"])
