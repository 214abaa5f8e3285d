"""Networks made for signs: sizes, shortcuts, and that they come back from their records."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.errors import UserError
from galago.models.reactnet import PairBlock, ReActNet, ReActNetA, RPReLU, SignBlock, reactnet18, reactnet20, reactnet_a
from galago.probes.cost import cost_table
from galago.spec import build, describe


def weights(network: nn.Module, size: int) -> int:
    """In the convolutions of one size behind the first."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)][1:]
    return sum(one.weight.numel() for one in convolutions if one.kernel_size == (size, size))


def test_reactnet_a_has_the_published_numbers_of_weights():
    with torch.device("meta"):
        network = reactnet_a()
    assert weights(network, 3) == 25_113_600
    assert weights(network, 1) == 3_139_584
    assert sum(parameter.numel() for parameter in network.linear.parameters()) == 1_025_000
    assert network.conv1.weight.numel() + 1_024_000 + weights(network, 3) + weights(network, 1) == 29_278_048


def test_reactnet_a_has_the_published_cost_and_features():
    with torch.device("meta"):
        network = reactnet_a().eval()
        image = torch.zeros(1, 3, 224, 224)
        assert network.blocks(network.bn1(network.conv1(image))).shape == (1, 1024, 7, 7)
        rows = cost_table(network, image)
    assert sum(row.macs for row in rows if "blocks" in row.path) == 4_816_896_000
    assert [row.macs for row in rows if "blocks" not in row.path] == [10_838_016, 1_024_000]


def test_reactnet18_halves_images_five_times_and_has_a_shortcut_around_every_convolution():
    with torch.device("meta"):
        network = reactnet18()
        stem = network.stem_pool(network.bn1(network.conv1(torch.zeros(1, 3, 224, 224))))
        assert stem.shape == (1, 64, 56, 56)
        assert network.layer4(network.layer3(network.layer2(network.layer1(stem)))).shape == (1, 512, 7, 7)
    blocks = [module for module in network.modules() if isinstance(module, SignBlock)]
    assert [block.width for block in blocks] == [64] * 4 + [128] * 4 + [256] * 4 + [512] * 4
    projecting = [block for block in blocks if not isinstance(block.shortcut, nn.Identity)]
    assert [(block.before, block.stride) for block in projecting] == [(64, 2), (128, 2), (256, 2)]


def test_reactnet20_is_resnet20_with_means_and_projections_around_where_it_halves():
    network = reactnet20()
    assert weights(network, 3) == 267_264
    assert weights(network, 1) == 16 * 32 + 32 * 64
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert reactnet20(classes=7, channels=1)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


def test_no_activation_is_called_twice():
    network, calls = reactnet20().eval(), []
    for module in network.modules():
        if isinstance(module, RPReLU):
            module.register_forward_hook(lambda layer, inputs, output: calls.append(layer))
    network(torch.zeros(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == 18


def test_a_shortcut_carries_the_real_values_past_the_convolution():
    block = SignBlock(3, 3).eval()
    block.bn.weight.data.zero_()
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(block(x), nn.functional.prelu(x, torch.full((3,), 0.25)))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_where_channels_multiply_the_shortcut_is_there_as_often(copies):
    block = PairBlock(3, 3 * copies, 2).eval()
    for norm in (block.bn1, block.bn2):
        norm.weight.data.zero_()
    x = torch.rand(2, 3, 6, 6)
    mean = nn.functional.avg_pool2d(x, 2)
    assert torch.allclose(block(x), torch.cat([mean] * copies, 1), atol=1e-6)


def test_a_number_of_channels_that_is_no_multiple_is_refused():
    with pytest.raises(UserError, match="PairBlock: width is 7; give a multiple of the 3"):
        PairBlock(3, 7)


def test_rprelu_is_a_shifted_prelu():
    module, x = RPReLU(2), torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for parameter in module.double().parameters():
        parameter.data.normal_()
    moved = x + module.before
    expected = torch.where(moved > 0, moved, module.slope.view(1, 2, 1, 1) * moved) + module.after
    torch.testing.assert_close(module(x), expected)
    assert module.own_rates().weight_decay == 0.0


@pytest.mark.parametrize(
    "network", [ReActNet([1, 2], [4, 6], classes=3, channels=1, small=False), ReActNetA(3, 1, 4, [4, 8, 8])]
)
def test_a_network_can_be_written_down_and_rebuilt(network):
    twin = build(describe(network)).eval()
    twin.load_state_dict(network.state_dict())
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(twin(x), network.eval()(x))
