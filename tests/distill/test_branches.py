"""Branches: which layers are branched, what is drawn anew, how their batches travel, and what they leave behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from galago.distill.branches import Parallel, branch, drawn_anew, fork_at, set_ranges
from galago.errors import UserError
from galago.layers import Wrapper
from galago.models.resnet import resnet20
from galago.models.tiny import Tiny
from galago.quantize.dorefa import DoReFaWeight
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from samples import Stripes


def images(count: int = 2, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def branched(model: nn.Module, path: str, count: int = 2, together: bool = False) -> list[nn.Module]:
    return branch(model, fork_at(model, path, images()).places, count, together)


@pytest.mark.parametrize(
    ("path", "places"),
    [
        ("layer3", ["layer3", "linear"]),
        ("layer3.1", ["layer3.1", "layer3.2", "linear"]),
        ("layer2", ["layer2", "layer3", "linear"]),
        ("pool", ["linear"]),
        ("linear", ["linear"]),
    ],
)
def test_the_layers_with_weights_from_a_path_on_are_found_in_order(path: str, places: list[str]) -> None:
    assert fork_at(resnet20(), path, images(size=32)).places == places


def test_what_comes_into_the_first_branched_layer_is_known() -> None:
    assert fork_at(resnet20(), "layer3", images(size=32)).trunk.shape == (2, 32, 16, 16)


def test_a_misspelt_path_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no layer 'layr3'; did you mean layer3"):
        fork_at(resnet20(), "layr3", images(size=32))


def test_a_layer_that_does_not_run_is_refused() -> None:
    model = Tiny(2, 3)
    model.idle = nn.Linear(2, 2)
    with pytest.raises(UserError, match="'idle' does not run"):
        fork_at(model, "idle", images())


def test_where_nothing_with_weights_follows_there_is_nothing_to_branch() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match="no layer with weights runs from '1' on"):
        fork_at(model, "1", images())


def test_a_layer_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).mean((2, 3))

    with pytest.raises(UserError, match="'conv' runs more than once"):
        fork_at(Twice(), "conv", images())


def test_all_branches_train_and_the_first_alone_predicts() -> None:
    model = Tiny(2, 3)
    alone = copy.deepcopy(model).eval()
    branched(model, "down", count=3)
    torch.testing.assert_close(model.eval()(images()), alone(images()), rtol=0, atol=0)
    assert model.train()(images()).shape == (6, 2)


def test_each_branch_computes_what_the_network_with_its_weights_would() -> None:
    model = Tiny(2, 3)
    branched(model, "down", count=3, together=True)
    whole = model.eval()(images(4))
    for number in range(3):
        single = copy.deepcopy(model)
        for name in ("down", "head"):
            parallel = getattr(single, name)
            setattr(single, name, [parallel.layer, *parallel.others][number])
        torch.testing.assert_close(whole[4 * number : 4 * number + 4], single(images(4)))


def test_the_trunk_runs_once_a_pass_on_the_plain_batch() -> None:
    model = Tiny(2, 3)
    branched(model, "down")
    seen: list[int] = []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    model.train()(images(5))
    assert seen == [5]


def test_layers_with_further_arguments_and_a_layer_under_two_names_are_branched_as_well() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor, mask: Tensor, *, scale: float) -> Tensor:
            return self.linear(x * mask) * scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)
            self.head = self.alias = Head()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).mean((2, 3))
            return self.alias(x, x.sign(), scale=2.0)

    model = Net()
    branched(model, "conv")
    assert model.head is model.alias
    assert isinstance(model.head, Parallel)
    assert model.train()(images()).shape == (4, 2)


def test_fresh_convolutions_follow_the_rule_and_normalization_begins_anew() -> None:
    layers = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(128, 128, 3, groups=128), nn.BatchNorm2d(128), nn.ReLU())
    layers[2].running_mean.fill_(3.0)
    layers[2].weight.data.fill_(3.0)
    drawn_anew(layers)
    for layer in layers[:2]:
        assert layer.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.1)
        assert (layer.bias == 0).all()
    assert (layers[2].weight == 1).all()
    assert (layers[2].running_mean == 0).all()


def test_the_first_branch_keeps_its_weights_and_the_others_do_not_have_them() -> None:
    model = Tiny(2, 3)
    before = copy.deepcopy(model.down[0].weight)
    fresh = branched(model, "down", count=3)
    assert torch.equal(model.down.layer[0].weight, before)
    assert len(fresh) == 4
    weights = [before, *(copy[0].weight for copy in model.down.others)]
    assert all(not torch.equal(a, b) for n, a in enumerate(weights) for b in weights[:n])


def test_who_watches_the_network_watches_the_first_branch_alone() -> None:
    model, seen = Tiny(2, 3), []
    model.down.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    branched(model, "down")
    seen.clear()
    model.train()(images())
    assert seen == [2]


def quantized(weight: nn.Module | None = None) -> tuple[nn.Module, list[nn.Module], Stripes]:
    data = Stripes()
    model = Quantize(weight or LSQWeight(4), LSQ(4), stream=MinMax(8)).prepare(Tiny(2, 3), data)
    fresh = branched(model, "down")
    return model, fresh, data


def test_fresh_quantized_layers_have_quantizers_of_their_own_on_their_own_ranges() -> None:
    model, fresh, data = quantized()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".others." not in name}
    modes = {name: module.training for name, module in model.named_modules()}
    set_ranges(model, fresh, data)
    for name, tensor in before.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    assert modes == {name: module.training for name, module in model.named_modules()}
    first, other = model.down.layer, model.down.others[0]
    first, other = (one.layer if isinstance(one, QuantOutput) else one for one in (first, other))
    assert not any(module.observing for module in model.modules() if isinstance(module, QuantLayer | QuantOutput))
    assert first[0].weight_quantizer is not other[0].weight_quantizer
    again = LSQWeight(4)
    again.initialize(other[0].layer.weight)
    assert torch.equal(other[0].weight_quantizer.step, again.step)


def test_fresh_layers_without_a_size_of_their_own_get_an_output_scale_that_fits() -> None:
    model, fresh, data = quantized(DoReFaWeight(4))
    scales = [m.output_scale for one in fresh for m in one.modules() if isinstance(m, QuantLayer)]
    before = [None if scale is None else scale.clone() for scale in scales]
    set_ranges(model, fresh, data)
    assert any(old is not None and not torch.equal(old, new) for old, new in zip(before, scales, strict=True))


def test_branching_inside_a_quantized_stage_works_on_the_layers_as_they_are_called() -> None:
    model = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)).prepare(Tiny(2, 3), Stripes())
    fork = fork_at(model, "block.conv", images())  # its sum needs what comes from before: to be found out by running it
    assert fork.places[0].startswith("block")
    model = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)).prepare(Tiny(2, 3), Stripes())
    branched(model, "down.0")
    assert model.train()(images()).shape == (4, 2)
    assert isinstance(model.get_submodule("head"), Wrapper)
