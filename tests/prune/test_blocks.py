"""Blocks: each layer in one of them, targets that can be met, and no more cut than that takes."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.models.mobilenet import mobilenet_v2
from galago.models.resnet import resnet20
from galago.prune.blocks import Block, Budget, partition, shared_out, shares, table
from galago.prune.cost import Operations, Parameters
from galago.prune.groups import Groups
from galago.prune.survey import survey


@cache
def network() -> tuple[nn.Module, Groups]:
    torch.manual_seed(0)
    model = resnet20().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.0, 1.0)
    return model, survey(model, torch.randn(1, 3, 32, 32))


def paths(given: list[Block] | None = None) -> dict[str, list[str]]:
    model, groups = network()
    layers = [layer.path for layer in groups.layers]
    return {path: [layers[i] for i in places] for path, places in partition(model, layers, given or []).items()}


def plan(share: float = 0.5, given: list[Block] | None = None) -> tuple[list[Block], Budget]:
    return shared_out(*network(), Operations(), given or [], share)


def gates() -> Tensor:
    return torch.rand(network()[1].count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_by_itself_a_network_falls_into_its_stages_with_stem_and_head() -> None:
    found = paths()
    assert list(found) == ["layer1", "layer2", "layer3"]
    assert [len(layers) for layers in found.values()] == [7, 6, 7]
    assert found["layer1"][0] == "conv1"
    assert found["layer3"][-1] == "linear"


def test_each_layer_is_in_the_innermost_block_given() -> None:
    found = paths([Block("layer1"), Block("layer1.0"), Block("conv1"), Block("layer3.2.conv2")])
    assert found["layer1.0"] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert len(found["layer1"]) == 4
    assert found["conv1"] == ["conv1"]
    assert found["layer3.2.conv2"] == ["layer3.2.conv2", "linear"]
    assert sum(map(len, found.values())) == 20


def test_a_network_without_stages_is_one_block() -> None:
    layers = ["0", "3", "6"]
    assert partition(nn.Sequential(), layers, []) == {"": [0, 1, 2]}
    assert partition(nn.Sequential(), layers, [Block("")]) == {"": [0, 1, 2]}


@pytest.mark.parametrize(
    ("block", "said"),
    [(Block("layer4"), "no layer 'layer4'; did you mean layer"), (Block("pool"), "block pool has no layers")],
)
def test_a_block_that_is_not_there_is_named(block: Block, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(given=[block])


@pytest.mark.parametrize(("options", "said"), [({"target": 0.0}, "target"), ({"strength": -1.0}, "strength")])
def test_numbers_that_make_no_sense_are_refused_by_name(options: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=f"block layer1: {said} is"):
        Block("layer1", **options)


def test_a_target_that_cannot_be_met_is_told_with_what_can() -> None:
    with pytest.raises(UserError, match=r"block 'layer1' cannot be cut down to 0.001 of its operations, but to 0\.0"):
        plan(share=0.001)


def test_a_block_of_which_nothing_can_be_cut_stays_as_it_is() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 3), nn.GroupNorm(1, 4)),
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)),
    )
    groups = survey(model.eval(), torch.randn(1, 3, 9, 9))
    blocks, budget = shared_out(model, groups, Parameters(), [], 0.5)
    assert [(block.path, block.target) for block in blocks] == [("0", 1.0), ("1", 0.5)]
    assert budget.target.tolist() == [1.0, 0.5]
    with pytest.raises(UserError, match=r"block '0' cannot be cut down to 0\.9"):
        shared_out(model, groups, Parameters(), [Block("0", target=0.9)], 0.5)


def test_what_is_left_is_each_blocks_own_share() -> None:
    _, budget = plan()
    groups, ones = network()[1], torch.ones(network()[1].count, dtype=torch.float64)
    made = {layer.path: layer.outputs for layer in groups.layers}
    alive = ones.clone()
    alive[made["layer2.1.conv1"][:16]] = 0.0  # half of the channels between two of its six equal layers
    left = budget.left(alive)
    assert left[[0, 2]].tolist() == [1.0, 1.0]
    sizes = [16 * 32, *[32 * 32] * 5]
    assert left[1].item() == pytest.approx(1 - 32 * 32 / sum(sizes))
    assert budget.relative().costs.cost(ones).sum().item() == pytest.approx(1.0)
    assert shares(plan()[0], budget, ones) == "1.000 (layer1 1.000, layer2 1.000, layer3 1.000)"


@pytest.mark.parametrize("target", [0.9, 0.5, 0.1])
def test_a_block_is_cut_down_to_its_target_and_not_a_channel_further(target: float) -> None:
    blocks, budget = plan(share=1.0, given=[Block("layer2", target=target)])
    strength = gates()
    alive = budget.trimmed(strength, torch.ones_like(strength))
    assert [block.target for block in blocks] == [1.0, target, 1.0]
    assert budget.left(alive)[1] <= target
    cut = (alive == 0).nonzero().flatten()
    alive[cut[strength[cut].argmax()]] = 1.0  # the last that went
    assert budget.left(alive)[1] > target


def test_the_weakest_go_first_and_the_strongest_of_a_layer_never() -> None:
    _, budget = plan(share=0.02)
    strength = gates()
    alive = budget.trimmed(strength, torch.ones_like(strength))
    assert (budget.left(alive) <= 0.02).all()
    for layer in network()[1].layers[:-1]:
        assert alive[layer.outputs[strength[layer.outputs].argmax()]] == 1
    inner = network()[1].layers[1].outputs
    assert strength[inner[alive[inner] == 1]].min() > strength[inner[alive[inner] == 0]].max()


def test_what_meets_its_target_is_left_alone() -> None:
    _, budget = plan(share=1.0)
    ones = torch.ones(network()[1].count, dtype=torch.float64)
    assert torch.equal(budget.trimmed(gates(), ones), ones)


def test_a_large_network_is_trimmed_in_no_time() -> None:
    model = mobilenet_v2(width=0.5).eval()
    groups = survey(model, torch.randn(1, 3, 32, 32))
    _, budget = shared_out(model, groups, Operations(), [], 0.3)
    strength = torch.rand(groups.count, dtype=torch.float64)
    assert (budget.left(budget.trimmed(strength, torch.ones_like(strength))) <= 0.3).all()


def test_the_table_shows_costs_targets_and_what_is_left_whole() -> None:
    blocks, budget = plan(given=[Block("layer1", target=0.25)])
    shown = table(blocks, budget, network()[1], "operations")
    cells = [list(column.cells) for column in shown.columns]
    assert cells[0] == ["layer1", "layer2", "layer3"]
    assert cells[3][0] == f"{2 * 9 * 1024 * (3 * 16 + 6 * 16 * 16):,}"
    assert cells[5] == ["0.25", "0.5", "0.5"]
    assert shown.caption == "left whole: linear (it gives the network's answer)"
