"""Where networks can grow, and why not elsewhere."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from galago.distill.junctions import Junction, allowed, junctions, without_wrappers
from galago.distill.widen import first_filters, innermost, widen
from galago.errors import UserError
from galago.laws.trial import TinyImages, tiny_network
from galago.layers import find
from galago.models.mobilenet import mobilenet_v2
from galago.models.resnet import ResNet
from galago.quantize.equalize import Equalize
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def test_residual_blocks_grow_inside() -> None:
    places, reasons = junctions(ResNet([2, 1], [4, 8]), IMAGE, 2)
    assert [(p.layer, p.norm, p.reader) for p in places] == [
        (f"{block}.conv1", f"{block}.bn1", f"{block}.conv2") for block in ("layer1.0", "layer1.1", "layer2.0")
    ]
    assert places[2] == Junction("layer2.0.conv1", "layer2.0.bn1", "layer2.0.conv2", 1, 256, 256)
    assert reasons["conv1"] == "2 operations read its result"
    assert reasons["layer1.0.conv2"] == "an addition in layer1.0 reads its result"
    assert len(places) + len(reasons) == 7


def test_networks_of_timm_grow_as_they_are_written() -> None:
    network = timm.create_model("resnet14t", num_classes=3)
    places, reasons = junctions(network, torch.randn(1, 3, 64, 64), 4)
    assert {p.layer for p in places} == {
        "conv1.0",
        "conv1.3",
        *(f"layer{n}.0.conv{m}" for n in (1, 2, 3, 4) for m in (1, 2)),
    }
    before = network.eval()(IMAGE)
    for place in places[:3]:
        layer = innermost(find(network, place.layer))
        widen(network, place, first_filters(layer.weight, 4, torch.Generator()))
    torch.testing.assert_close(network(IMAGE), before, rtol=1e-4, atol=1e-5)
    assert set(reasons.values()) >= {"an addition in layer1.0 reads its result"}


def test_groups_are_named_where_they_are_in_the_way() -> None:
    places, reasons = junctions(mobilenet_v2(), IMAGE, 2)
    assert [place.reader for place in places] == ["blocks.1.widen.0", "last.0", "linear"]
    assert "it computes in groups of channels" in reasons.values()
    assert any(why.endswith("which reads it, computes in groups of channels") for why in reasons.values())


class Odd(nn.Module):
    """A width in its code, a convolution that runs twice, one whose result leaves, and one that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.told, self.idle, self.mixed = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)
        self.tokens = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.written(x)
        x = self.twice(self.twice(x.view(-1, 4, 32, 32)))
        self.idle(x)
        return self.told(x), self.tokens(self.mixed(x).flatten(2).transpose(1, 2))


def test_what_cannot_grow_has_its_reason() -> None:
    places, reasons = junctions(Odd(), IMAGE, 2)
    assert places == []
    assert reasons == {
        "written": "the network does not run with more channels here",
        "twice": "it runs 2 times in one pass",
        "told": "the network gives out its result",
        "idle": "0 operations read its result",
        "mixed": "`transpose` in the network itself reads its result",
    }


class TwoHeads(nn.Module):
    """A second head, which runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.further = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.head, self.second = nn.Linear(5, 2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inner = self.conv(x).relu()
        output = {"main": self.head(self.further(inner).mean((2, 3)))}
        return output | {"second": self.second(inner)} if self.training else output


def test_a_layer_that_feeds_another_in_training_alone_cannot_grow() -> None:
    places, reasons = junctions(TwoHeads(), IMAGE, 2)
    assert [place.layer for place in places] == ["further"]
    assert reasons == {"conv": "the network does not run with more channels here"}


def test_what_is_compared_keeps_its_shape() -> None:
    network = tiny_network()
    free, _ = junctions(network, torch.randn(1, 3, 8, 8), 2)
    places, reasons = junctions(network, torch.randn(1, 3, 8, 8), 2, compared=["down", "block"])
    assert [p.layer for p in free] == ["block.first.0", "down.0"]
    assert [p.layer for p in places] == ["block.first.0"]
    assert reasons["down.0"] == "down, which a lesson compares, would have other channels"


def test_looking_changes_nothing() -> None:
    network = tiny_network().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    junctions(network, torch.randn(1, 3, 8, 8), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


def quantized(weight, *first) -> nn.Module:
    model = tiny_network()
    for method in (*first, Quantize(weight, LSQ(4), stream=MinMax(8))):
        model = method.prepare(model, TinyImages())
    return model


def test_a_quantized_network_grows_in_the_same_places() -> None:
    image = torch.randn(1, 3, 8, 8)
    expected, _ = junctions(tiny_network(), image, 2)
    model = quantized(LSQWeight(4))
    found, _ = junctions(model, image, 2)
    assert found == expected
    assert any(module is not innermost(module) for module in model.modules())
    assert str(without_wrappers(model)) == str(tiny_network())


def test_weights_that_cannot_be_zero_keep_a_layer_from_growing() -> None:
    model = tiny_network()
    model = Quantize(EWGSWeight(4), EWGS(4), stream=MinMax(8)).prepare(model, TinyImages())
    _, reasons = junctions(model, torch.randn(1, 3, 8, 8), 2)
    assert reasons["block.first.0"] == "more channels here would change what the network says"


def test_folded_batch_norms_keep_a_layer_from_growing() -> None:
    places, reasons = junctions(quantized(LSQWeight(4), Equalize()), torch.randn(1, 3, 8, 8), 2)
    assert "block.first.0" not in [place.layer for place in places]
    assert reasons["block.first.0"] == "block.first.1 is folded"


def test_patterns_choose_and_those_that_mean_nothing_are_named() -> None:
    found = junctions(ResNet([1, 1], [4, 8]), IMAGE, 2)
    assert [p.layer for p in allowed(*found, patterns=["layer2.*"])] == ["layer2.0.conv1"]
    assert len(allowed(*found, patterns=[])) == 2
    with pytest.raises(
        UserError, match=r"'layer1.0.conv2' matches no .* grow: layer1.0.conv2: an addition in layer1.0"
    ):
        allowed(*found, patterns=["layer1.0.conv2"])
    with pytest.raises(UserError, match=r"it has no convolution"):
        allowed(*junctions(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), IMAGE, 2), patterns=[])
