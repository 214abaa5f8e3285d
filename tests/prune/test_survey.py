"""Channel groups: whatever network it is, cutting channels out gives the answers of silencing them, or they stay."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

from galago.models.mobilenet import mobilenet_v2
from galago.models.reactnet import reactnet20
from galago.models.resnet import resnet18_cifar, resnet20
from galago.models.tiny import tiny
from galago.probes.cost import cost_table
from galago.prune.cost import Operations, Parameters, costs_of
from galago.prune.groups import ALWAYS, Groups, strengths
from galago.prune.surgery import narrow, silence
from galago.prune.survey import parts, survey

published = torchvision.models.get_model
ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 32),
    "resnet18_cifar": (resnet18_cifar, 16),
    "mobilenet_v2": (lambda: mobilenet_v2(width=0.25), 32),
    "reactnet20": (reactnet20, 16),
    "tiny": (lambda: tiny(channels=3), 16),
    "torchvision resnet18": (lambda: published("resnet18"), 32),
    "torchvision mobilenet_v2": (lambda: published("mobilenet_v2", width_mult=0.25), 32),
    "torchvision mobilenet_v3_small": (lambda: published("mobilenet_v3_small", width_mult=0.5), 32),
    "torchvision squeezenet": (lambda: published("squeezenet1_1"), 48),
    "torchvision shufflenet": (lambda: published("shufflenet_v2_x0_5"), 32),
    "torchvision regnet": (lambda: published("regnet_x_400mf"), 32),
    "timm mobilenetv2": (lambda: timm.create_model("mobilenetv2_035"), 32),
    "timm densenet": (lambda: timm.create_model("densenet121", growth_rate=4, block_config=(2, 2, 2, 2)), 32),
    "timm resnetv2": (lambda: timm.create_model("resnetv2_50", layers=[1, 1, 1, 1]), 32),
    "timm repvgg": (lambda: timm.create_model("repvgg_a0"), 32),
}


def shaken(model: nn.Module) -> nn.Module:
    """The network with statistics and shifts as training gives them: none of them zero."""
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        nn.init.normal_(norm.running_mean, 0.0, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.2)
    return model.eval()


@cache
def surveyed(name: str) -> tuple[nn.Module, Tensor, Groups]:
    """A network of the zoo, images for it, and its groups."""
    make, size = ZOO[name]
    model, image = shaken(make()), torch.randn(2, 3, size, size)
    return model, image, survey(model, image)


def half(groups: Groups) -> Tensor:
    """Some groups that may be kept, so that every layer keeps a channel."""
    drawn = torch.rand(groups.count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return costs_of(groups, Parameters()).alive(drawn, 0.5).bool()


def macs(model: nn.Module, image: Tensor) -> int:
    return sum(row.macs for row in cost_table(model, image))


@torch.no_grad()
def both_ways(model: nn.Module, image: Tensor, groups: Groups, kept: Tensor) -> tuple[Tensor, Tensor]:
    """What the network answers with channels cut out, and with channels silenced, in float64."""
    cut, silent = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    narrow(cut, groups, kept)
    silence(silent, groups, kept)
    return cut(image.double()), silent(image.double())


@pytest.mark.parametrize("name", ZOO)
def test_a_published_network_with_channels_cut_out_answers_as_with_channels_silenced(name: str) -> None:
    model, image, groups = surveyed(name)
    kept = half(groups)
    assert groups.count > 0
    assert 0 < kept.sum() < groups.count
    found, expected = both_ways(model, image, groups, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("name", ZOO)
def test_costs_are_those_of_the_counter_before_and_after_the_cut(name: str) -> None:
    model, image, groups = surveyed(name)
    kept, costs = half(groups), costs_of(groups, Operations())
    weights = costs_of(groups, Parameters())
    for alive in (torch.ones(groups.count, dtype=torch.bool), kept):
        narrow(cut := copy.deepcopy(model), groups, alive)
        assert costs.cost(alive.double()).sum() == 2 * macs(cut, image)
        multiplied = [cut.get_submodule(layer.path).get_parameter("weight").numel() for layer in groups.layers]
        assert weights.cost(alive.double()).tolist() == multiplied


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "torchvision resnet18", "tiny"])
def test_only_the_layer_that_answers_is_whole_in_usual_networks(name: str) -> None:
    _, _, groups = surveyed(name)
    assert list(groups.whole.values()) == ["it gives the network's answer"]


def test_channels_of_a_residual_stream_are_one_group_through_option_a() -> None:
    _, _, groups = surveyed("resnet20")
    made = {layer.path: layer.outputs for layer in groups.layers}
    first, second = made["conv1"], made["layer2.0.conv2"]
    assert all(torch.equal(made[f"layer1.{block}.conv2"], first) for block in range(3))
    assert torch.equal(second[8:24], first)
    assert torch.equal(made["layer3.1.conv2"][16:48], second)
    assert not set(made["layer1.0.conv1"].tolist()) & set(first.tolist())


def test_both_sides_of_a_depth_wise_convolution_are_one_group() -> None:
    _, _, groups = surveyed("mobilenet_v2")
    layers = {layer.path: layer for layer in groups.layers}
    assert torch.equal(layers["blocks.1.widen.0"].outputs, layers["blocks.1.filter.0"].outputs)
    assert torch.equal(layers["blocks.1.filter.0"].outputs, layers["blocks.1.narrow.0"].inputs)
    assert layers["blocks.1.filter.0"].inputs.tolist() == [ALWAYS]


def test_the_layout_in_memory_makes_no_difference() -> None:
    model, image, groups = surveyed("resnet20")
    other = survey(copy.deepcopy(model).to(memory_format=torch.channels_last), image)
    assert other.count == groups.count
    assert all(torch.equal(a.outputs, b.outputs) for a, b in zip(groups.layers, other.layers, strict=True))


def test_looking_leaves_the_network_as_it_was() -> None:
    model = shaken(resnet20()).train()
    model.layer1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    survey(model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())


class Net(nn.Module):
    """Two convolutions with BatchNorm and a linear layer, and a place between them for whatever is tried."""

    def __init__(self, between: nn.Module | None = None, width: int = 6, second: int | None = None) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.between = nn.ReLU() if between is None else between
        self.second = nn.Conv2d(width if second is None else second, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.between(self.norm(self.first(x))))
        return self.head(x.relu().mean((2, 3)))


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Shifted(nn.Module):
    """A shift and a slope for each channel, and a constant that is stored as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6, 1, 1))
        self.register_buffer("constant", torch.randn(6))
        self.slope = nn.PReLU(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.slope(x + self.shift) + self.constant.view(1, -1, 1, 1)


class Excited(nn.Module):
    """Squeeze and excitation: channels weighed by a sigmoid."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.excite(nn.functional.hardswish(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * weight.sigmoid()


class Twice(nn.Module):
    """One convolution that runs twice in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.conv(x).relu())) + x


class Raw(nn.Module):
    """A convolution without a module of its own, and a linear layer over places."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, 1, 1))
        self.pointwise = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.weight).relu()
        return self.pointwise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


UNDERSTOOD = {
    "one channel": lambda: nn.Sequential(nn.Conv2d(6, 1, 1), nn.ReLU(), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU()),
    "depth-wise without BatchNorm": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1)),
    "stored": Shifted,
    "excited": Excited,
    "in place": lambda: nn.Sequential(nn.ReLU6(inplace=True), nn.Hardswish(inplace=True), nn.SiLU()),
    "shared": Twice,
    "without modules": Raw,
    "permuted": lambda: Apply(lambda x: x.permute(0, 2, 3, 1).relu().transpose(1, 3).transpose(2, 3)),
    "pooled": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.AvgPool2d(3, 1, 1), nn.ELU()),
    "padded": lambda: nn.ZeroPad2d(1),
    "places cut off": lambda: Apply(lambda x: x[:, :, 1:, ::2]),
    "residual": lambda: Apply(lambda x: x + x.relu() * 0.5 - x / 3),
    "not normalized by factors": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_channels_are_followed_through(name: str) -> None:
    model, image = shaken(Net(UNDERSTOOD[name]())), torch.randn(2, 3, 8, 8)
    groups = survey(model, image)
    assert groups.whole.keys() <= {"head", "between.0"}
    kept = half(groups)
    found, expected = both_ways(model, image, groups, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 0


class Joined(nn.Module):
    """Two branches, concatenated, and then either convolved or flattened for a linear layer."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.left = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.right, self.conv = nn.Conv2d(3, 5, 1), nn.Conv2d(11, 7, 3)
        self.wide, self.head = nn.Linear(99, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        if not self.flat:
            return self.head(self.conv(x).mean((2, 3)))
        return self.head(nn.functional.gelu(self.wide(nn.functional.adaptive_max_pool2d(x, (3, 3)).flatten(1))))


@pytest.mark.parametrize("flat", [False, True])
def test_concatenated_and_flattened_channels_are_followed(flat: bool) -> None:
    model, image = shaken(Joined(flat)), torch.randn(2, 3, 8, 8)
    groups = survey(model, image)
    assert groups.count == 6 + 5 + 7
    found, expected = both_ways(model, image, groups, half(groups))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_fixed_number_of_zeros_stays_between_channels_that_may_go() -> None:
    class Padded(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.pad(self.norm(self.first(x)), (0, 0, 0, 0, 1, 2))
            return self.head((self.second(x).relu() * 2).mean((2, 3)))

    model, image = shaken(Padded(second=9)), torch.randn(2, 3, 8, 8)
    groups = survey(model, image)
    assert [layer.inputs.tolist() for layer in groups.layers][1] == [-1, *range(6), -1, -1]
    found, expected = both_ways(model, image, groups, half(groups))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


LEFT_WHOLE = {
    "a sigmoid": (lambda: nn.Sigmoid(), 6, "not zero"),
    "an activation that shifts": (lambda: Apply(lambda x: x.clamp_min(0.1)), 6, "not zero"),
    "a norm over channels": (lambda: nn.GroupNorm(1, 6), 6, "native_group_norm in between is not followed"),
    "a softmax": (lambda: nn.Softmax(1), 6, "_softmax in between is not followed"),
    "a chunk": (lambda: Apply(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1]), 3, "split in between is not followed"),
    "a slice": (lambda: Apply(lambda x: x[:, :4]), 4, "slice in between is not followed"),
    "a shuffle": (lambda: nn.ChannelShuffle(2), 6, "between is not followed"),
    "channels as places": (lambda: nn.PixelShuffle(1), 6, ""),
    "a grouped convolution": (lambda: nn.Conv2d(6, 6, 1, groups=2), 6, "the convolution between has 2 groups"),
    "an attention": (lambda: Apply(lambda x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view(x.shape)), 6, "bmm"),
    "a fixed size": (lambda: Apply(lambda x: x.reshape(-1, 6, 8, 8)), 6, "the network's code fixes its size"),
    "what is unknown": (lambda: Apply(lambda x: x + torch.arange(6.0).view(1, 6, 1, 1)), 6, "add in between"),
    "a view that is overwritten": (lambda: Apply(overwritten), 6, "is not followed"),
}


def overwritten(x: Tensor) -> Tensor:
    """The same tensor, changed through another name."""
    x = x * 1.0
    x.view(-1).add_(1.0)
    return x


@pytest.mark.parametrize("name", LEFT_WHOLE)
def test_what_is_not_understood_is_left_whole_with_a_reason(name: str) -> None:
    make, second, reason = LEFT_WHOLE[name]
    model, image = shaken(Net(make(), second=second)), torch.randn(2, 3, 8, 8)
    groups = survey(model, image)
    assert reason in groups.whole.get("first", "") or not reason
    kept = half(groups)
    assert not kept.all()  # the second convolution is not concerned
    found, expected = both_ways(model, image, groups, kept)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_layers_with_computed_weights_are_left_whole_and_so_is_what_they_read() -> None:
    model = Net()
    model.second = weight_norm(model.second)
    groups = survey(model.eval(), torch.randn(1, 3, 8, 8))
    assert "convolution in second is not followed" in groups.whole["first"]
    assert groups.count == 0


def test_two_parts_that_only_fail_together_are_left_whole_together() -> None:
    class Same(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.first(x)).relu()
            y = self.second(x)
            scale = 1.0 if (x.shape[1] < 6) == (y.shape[1] < 5) else 2.0
            return self.head(y.mean((2, 3))) * scale + (x.shape[1] < 6 and y.shape[1] < 5)

    groups = survey(shaken(Same()), torch.randn(1, 3, 8, 8))
    assert groups.count == 0
    assert "other answers" in groups.whole["first"]


def test_parts_are_what_is_cut_out_of_one_weight() -> None:
    model = Net()
    groups = survey(model.eval(), torch.randn(1, 3, 8, 8))
    assert sorted(map(len, parts(groups))) == [5, 6]


def test_the_strength_of_a_group_is_that_of_its_strongest_gate() -> None:
    model = shaken(Net(Twice()))
    groups = survey(model, torch.randn(1, 3, 8, 8))
    found = strengths(model, groups)
    made = {layer.path: layer.outputs for layer in groups.layers}
    stream, lone = made["first"], made["second"]
    filters = model.between.conv.weight.flatten(1).norm(dim=1)
    wanted = torch.stack([model.norm.weight, model.between.norm.weight, filters]).abs().amax(0)
    assert torch.equal(made["between.conv"], stream)
    torch.testing.assert_close(found[stream], wanted)
    torch.testing.assert_close(found[lone], model.second.weight.flatten(1).norm(dim=1))
