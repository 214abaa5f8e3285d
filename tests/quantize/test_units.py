"""Units of networks that people use: blocks where branches meet, single layers elsewhere, each layer once."""

from __future__ import annotations

from itertools import pairwise

import timm
import torch
import torchvision
from torch import Tensor, nn

from galago.models.resnet import resnet20
from galago.models.tiny import Tiny
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.quantize.rest import rests
from galago.quantize.units import Unit, resting, units
from samples import SmallNet, Stripes


def quantized(model: nn.Module, size: int = 8) -> tuple[nn.Module, Tensor]:
    data = Stripes(batch_size=2, size=size)
    method = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))
    return method.prepare(model, data).eval(), data.normalize(data.example())


def found(model: nn.Module, size: int = 8, blocks: bool = True) -> list[Unit]:
    model, example = quantized(model, size)
    modes, inside = [module.training for module in model.modules()], units(model, example, blocks)
    assert modes == [module.training for module in model.modules()]
    assert not rests(model)
    layers = [path for path, module in model.named_modules() if isinstance(module, QuantLayer)]
    assert sorted(layer for unit in inside for layer in unit.layers) == sorted(layers)
    with torch.no_grad(), resting(model, True):
        check_runs_alone(model, inside, example)
    return inside


def check_runs_alone(model: nn.Module, inside: list[Unit], example: Tensor) -> None:
    """A unit run alone on what it takes gives what it gives in the network; the order is that of execution."""
    order: list[str] = []
    took: dict[str, Tensor] = {}
    gave: dict[str, Tensor] = {}

    def enter(unit: Unit):
        def hook(module, args):
            order.append(unit.name)
            took[unit.name] = args[0].clone()

        return hook

    def leave(unit: Unit):
        def hook(module, args, output):
            gave[unit.name] = output.clone()

        return hook

    handles = [model.get_submodule(unit.paths[0]).register_forward_pre_hook(enter(unit)) for unit in inside]
    handles += [model.get_submodule(unit.paths[-1]).register_forward_hook(leave(unit)) for unit in inside]
    model(example)
    for handle in handles:
        handle.remove()
    assert order == [unit.name for unit in inside]
    for unit in inside:
        assert torch.equal(unit.parts(model)(took[unit.name].clone()), gave[unit.name]), unit.name


def names(inside: list[Unit]) -> list[str]:
    return [unit.name for unit in inside]


def test_a_residual_network_has_its_blocks_its_stem_and_its_head() -> None:
    inside = found(resnet20(), 16)
    blocks = [f"layer{stage}.{number}" for stage in (1, 2, 3) for number in range(3)]
    assert names(inside) == ["conv1", *blocks, "linear"]
    assert inside[0].paths == ("conv1", "bn1", "relu")
    assert inside[1].layers == ("layer1.0.conv1", "layer1.0.conv2")
    assert [one.gives == other.takes for one, other in pairwise(inside)] == [True] * 9 + [False]


def test_layer_by_layer_each_layer_goes_with_its_normalization_and_activation() -> None:
    inside = found(resnet20(), 16, blocks=False)
    assert len(inside) == 20
    assert inside[1].paths == ("layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu1")
    assert inside[2].paths == ("layer1.0.conv2", "layer1.0.bn2")


def test_projections_in_shortcuts_belong_to_their_blocks() -> None:
    inside = found(timm.create_model("resnet18"), 32)
    assert len(inside) == 10
    assert inside[0].paths == ("conv1", "bn1", "act1")
    assert {"layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0"} == set(inside[3].layers)


def test_an_activation_called_twice_in_a_block_is_no_obstacle() -> None:
    inside = found(torchvision.models.resnet18(), 32)
    assert names(inside)[1:9] == [f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)]


def test_inverted_residuals_without_a_shortcut_are_blocks_too() -> None:
    inside = found(timm.create_model("mobilenetv2_050"), 32)
    blocks = [unit for unit in inside if len(unit.layers) > 1]
    assert all(len(unit.layers) == 3 for unit in blocks)
    assert len(blocks) == 16
    assert {"blocks.1.0", "blocks.6.0"} <= {*names(blocks)}  # which have none


def test_branches_that_are_concatenated_make_a_block() -> None:
    inside = found(torchvision.models.shufflenet_v2_x0_5(), 32)
    assert [len(unit.layers) for unit in inside[1:5]] == [5, 3, 3, 3]


def test_grouped_convolutions_are_layers_as_any() -> None:
    inside = found(timm.create_model("resnext26ts"), 32)
    assert sum(len(unit.layers) >= 3 for unit in inside) == 8


def test_blocks_that_hold_most_of_a_larger_one_are_units_instead_of_it() -> None:
    class Stage(nn.Module):
        """Half of the channels through `blocks`, then both halves side by side."""

        def __init__(self, blocks: int) -> None:
            super().__init__()
            self.split = nn.Conv2d(8, 8, 1)
            self.blocks = nn.Sequential(*(Tiny(channels=3, width=4).block for _ in range(blocks)))
            self.join = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.split(x).chunk(2, 1)
            return self.join(torch.cat([first, self.blocks(second)], 1))

    def network(blocks: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), Stage(blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    assert names(found(network(1))) == ["0", "1", "4"]
    assert names(found(network(3))) == ["0", "1.split", "1.blocks.0", "1.blocks.1", "1.blocks.2", "1.join", "4"]


def test_branches_that_meet_in_the_network_itself_leave_single_layers(small_net: SmallNet) -> None:
    inside = found(small_net)
    assert [unit.paths for unit in inside] == [("conv1", "bn1", "relu1"), ("conv2", "bn2"), ("fc",)]


def test_a_wrapped_block_keeps_its_wrapper_and_its_stream() -> None:
    model, example = quantized(torchvision.models.resnet18(), 32)
    assert isinstance(model.get_submodule("layer1.0"), QuantOutput)
    block = next(unit for unit in units(model, example) if unit.name == "layer1.0")
    assert isinstance(block.parts(model)[0], QuantOutput)
    assert [*block.quant_layers(model)] == [*block.layers]


def test_a_stream_behind_a_unit_is_not_passed_over() -> None:
    """In float it gives the same tensor, so what comes next must not be taken from the unit itself."""
    model, example = quantized(Tiny(channels=3))
    model.block = QuantOutput(nn.Sequential(model.block), MinMax(8))
    inside = {unit.name: unit for unit in units(model.eval(), example)}
    assert inside["block.layer.0"].gives == -1
    assert inside["stem.0"].gives == inside["block.layer.0"].takes
