"""Costs against golden integers, hand counts and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from galago.models import resnet
from galago.models.mobilenet import mobilenet_v2
from galago.models.tiny import tiny
from galago.probe import Deployed
from galago.probes.cost import Cost, cost_table, packed_bytes, parameters_of
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ
from galago.tasks.classify import Classify
from galago.testing import check_probe

GOLDEN = np.load(Path(__file__).parents[1] / "golden/structure/cost_model.npz")


def macs(network: nn.Module, *shape: int) -> int:
    return sum(row.macs for row in cost_table(network, torch.zeros(1, *shape)))


def built(name: str) -> tuple[nn.Module, int]:
    with torch.device("meta"):  # shapes are enough, and quick
        if name.startswith("cifar"):
            return getattr(resnet, name.replace("cifar", "resnet"))(), 32
        options = {"init_weights": False} if name.startswith("vgg") else {}
        return torchvision.models.get_model(name, **options), 224


@pytest.mark.parametrize("row", range(len(GOLDEN["net_names"])), ids=[str(name) for name in GOLDEN["net_names"]])
def test_known_networks_have_their_golden_parameters_and_macs(row: int) -> None:
    network, pixels = built(str(GOLDEN["net_names"][row]))
    assert sum(parameter.numel() for parameter in parameters_of(network)) == GOLDEN["net_params"][row]
    with torch.device("meta"):
        assert macs(network, 3, pixels, pixels) == GOLDEN["net_core_macs"][row]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: resnet.resnet18_cifar(), 555_422_720),
        (lambda: mobilenet_v2(), 87_976_448),
        (lambda: torchvision.models.densenet121(), 2_834_161_664),
        (lambda: torchvision.models.efficientnet_b0(), 385_814_752),
        (lambda: timm.create_model("deit_tiny_patch16_224"), 1_253_683_200),
    ],
    ids=["resnet18_cifar", "mobilenet_v2", "densenet121", "efficientnet_b0", "deit_tiny"],
)
def test_further_networks_have_their_known_macs(build: type, expected: int) -> None:
    with torch.device("meta"):
        network = build()
        pixels = 32 if isinstance(network, resnet.ResNet) or type(network).__module__.startswith("galago") else 224
        assert macs(network, 3, pixels, pixels) == expected


@pytest.mark.parametrize("row", range(len(GOLDEN["layer_spec"])))
def test_single_layers_have_their_golden_counts(row: int) -> None:
    kind, high, wide, before, after, kh, kw, stride, pad, dilation, groups, extra, bias = (
        int(value) for value in GOLDEN["layer_spec"][row]
    )
    layer: nn.Module
    if kind:
        layer = nn.ConvTranspose2d(before, after, (kh, kw), stride, pad, extra, groups, bool(bias), dilation)
    else:
        layer = nn.Conv2d(before, after, (kh, kw), stride, pad, dilation, groups, bool(bias))
    height, width, parameters, expected = GOLDEN["layer_expected"][row]
    assert layer(torch.zeros(1, before, high, wide)).shape[2:] == (height, width)
    (found,) = cost_table(nn.Sequential(layer), torch.zeros(1, before, high, wide))
    assert (found.parameters, found.macs) == (parameters, expected)


def test_rows_are_packed_to_whole_bytes() -> None:
    assert [packed_bytes(*map(int, row)) for row in GOLDEN["store_spec"]] == GOLDEN["store_bytes"].tolist()


class Attention(nn.Module):
    """PyTorch's own attention layer over N tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attend(x, x, x, need_weights=False)[0]
        return output


def test_attention_counts_its_products_although_pytorch_would_fuse_them() -> None:
    n, d = 5, 8
    assert macs(Attention(), n, d) == 4 * n * d * d + 2 * n * n * d
    assert torch.backends.mha.get_fastpath_enabled()


class Twice(nn.Module):
    """Runs its layer twice, then a functional product."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.layer(x))
        return y @ torch.ones(4, 3)


def test_a_layer_that_runs_twice_counts_twice_but_is_stored_once() -> None:
    numbers = Cost()(Deployed(Twice(), nn.Identity(), Classify(3)), Classify(3), Vectors())  # type: ignore[arg-type]
    assert numbers["parameters"] == 16
    assert numbers["macs"] == 2 * 16 + 12
    assert numbers["weight_bytes"] == 64


class Vectors:
    """Data of which only the example is asked."""

    def example(self) -> Tensor:
        return torch.ones(1, 4)


class Images:
    """Data of which only the example is asked."""

    def example(self) -> Tensor:
        return torch.zeros(1, 1, 8, 8)


def quantized(bits: int) -> nn.Module:
    network = tiny(width=4)
    network.block.conv = QuantLayer(  # type: ignore[union-attr,assignment]
        network.block.conv,  # type: ignore[union-attr,arg-type]
        LSQ(bits, signed=True),
        LSQ(bits, signed=False),
    )
    return network


def measured(network: nn.Module) -> dict[str, float]:
    return Cost()(Deployed(network, nn.Identity(), Classify(10)), Classify(10), Images())  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_bits_of_a_quantized_layer_enter_operations_and_bytes(bits: int) -> None:
    plain, small = measured(tiny(width=4)), measured(quantized(bits))
    layer, weights = 8 * 8 * 4 * 4 * 9, 4 * 4 * 9
    assert plain["bops"] == 1024 * plain["macs"]
    assert small["macs"] == plain["macs"]
    assert small["parameters"] == plain["parameters"]
    assert plain["bops"] - small["bops"] == layer * (1024 - bits * bits)
    scales = 4 * quantized(bits).block.conv.weight_quantizer.grid().scale.numel()  # type: ignore[union-attr,operator]
    assert plain["weight_bytes"] - small["weight_bytes"] == 4 * weights - (4 * ((36 * bits + 7) // 8) + scales)


def test_mean_bits_weigh_layers_by_their_size() -> None:
    total = 36 + 144 + 144 + 4 * 8 * 9 + 80
    assert measured(tiny(width=4))["mean_weight_bits"] == 32
    assert measured(quantized(2))["mean_weight_bits"] == pytest.approx((2 * 144 + 32 * (total - 144)) / total)


def test_a_quantized_layer_is_listed_where_it_stands() -> None:
    rows = {row.path: row for row in cost_table(quantized(4), torch.zeros(1, 1, 8, 8))}
    assert list(rows) == ["stem.0", "block.first.0", "block.conv", "down.0", "head"]
    assert rows["block.conv"].type == "Conv2d"
    assert rows["block.conv"].shape == [4, 4, 3, 3]
    assert (rows["block.conv"].weight_bits, rows["block.conv"].input_bits) == (4, 4)
    assert rows["head"].weight_bits is None


def test_the_whole_is_the_sum_of_the_layers_and_counting_leaves_nothing_behind() -> None:
    network = resnet.resnet20()
    first, second = (cost_table(network, torch.zeros(1, 3, 32, 32)) for _ in range(2))
    assert first == second
    assert sum(row.macs for row in first) == 40_551_040
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert network.training


def test_twice_the_size_is_four_times_the_convolutions() -> None:
    network = tiny(width=4)
    small, large = (cost_table(network, torch.zeros(1, 1, size, size)) for size in (8, 16))
    assert [b.macs / a.macs for a, b in zip(small, large, strict=True)] == [4, 4, 4, 4, 1]


def test_a_file_has_no_layers_to_count() -> None:
    assert Cost()(nn.Identity(), Classify(10), Images()) == {}  # type: ignore[arg-type]


def test_the_laws_of_probes_hold() -> None:
    check_probe(Cost, same_on_artifact=False)
