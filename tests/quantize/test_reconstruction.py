"""Reconstruction: distances as the public code has them, what goes into a unit, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.models.tiny import Tiny
from galago.quantize.calibration import first_inputs
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.quantize.reconstruction import (
    Errors,
    Learned,
    distance,
    error,
    float_copy,
    inputs,
    kept_if_better,
    learning,
    mending,
    minimize,
    outputs,
    scores,
    walk,
)
from galago.quantize.rest import rest, rests
from galago.quantize.units import units
from samples import Stripes


@pytest.fixture
def quantized(stripes: Stripes) -> nn.Module:
    torch.manual_seed(0)
    return Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)).prepare(Tiny(2, 3, width=5), stripes).eval()


@pytest.fixture
def images(stripes: Stripes) -> Tensor:
    return first_inputs(stripes, 3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("key", "power", "fisher"), [("l2", 2.0, False), ("l2p4", 2.4, False), ("fisher_diag", 2.0, True)]
)
def test_distances_are_the_official_codes(golden, key: str, power: float, fisher: bool) -> None:
    want = {name.removeprefix("rec_"): value for name, value in golden("ptq").items() if name.startswith("rec_")}
    found = distance(want["pred"], want["target"], power, want["fisher"] if fisher else None)
    assert found.item() == pytest.approx(want[f"expected_{key}"].item(), rel=1e-5)


def test_a_distance_is_the_sum_over_channels_and_the_mean_over_all_else() -> None:
    found, target = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    assert distance(found, target).item() == pytest.approx(4 * (found - target).square().mean().item(), rel=1e-5)
    tokens = found.flatten(2).mT
    assert distance(tokens, target.flatten(2).mT).item() == pytest.approx(distance(found, target).item(), rel=1e-5)


def test_a_walk_gives_what_goes_in_float_and_quantized_and_what_should_come_out(quantized, images) -> None:
    sequence = units(quantized, images[:1])
    teacher = float_copy(quantized)
    seen = {}
    for unit, features in walk(quantized, teacher, sequence, images):
        seen[unit.name] = features
        for net, held in ((teacher, features.plain), (quantized, features.given)):
            torch.testing.assert_close(inputs(net, unit, images), held)
        torch.testing.assert_close(features.target, unit.parts(teacher)(features.plain))
    assert torch.equal(seen["stem.0"].given, images)
    torch.testing.assert_close(seen["head"].target, teacher(images))
    assert not torch.allclose(seen["head"].given, seen["head"].plain)


def test_a_unit_sees_what_was_done_to_those_before_it(quantized, images) -> None:
    sequence, given = units(quantized, images[:1]), []
    for unit, features in walk(quantized, float_copy(quantized), sequence, images):
        given.append(features)
        for layer in unit.quant_layers(quantized).values():
            layer.layer.weight.data.zero_()
        if layer.layer.bias is not None:
            layer.layer.bias.data.zero_()
    assert given[-1].given.std(0).max() < 1e-6  # the same for all images
    assert given[-1].plain.std(0).max() > 0.01  # the float network was not touched


def test_the_float_copy_computes_as_the_network_did_before_it_was_quantized(stripes, images) -> None:
    model = Tiny(2, 3, width=5).eval()
    with torch.no_grad():
        before = model(images)
        quantized = Quantize(LSQWeight(2), LSQ(2), stream=MinMax(8)).prepare(model, stripes).eval()
        teacher = float_copy(quantized)
        assert torch.equal(teacher(images), before)
        assert not torch.allclose(quantized(images), before)
    assert not rests(quantized)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_features_stay_as_they_are_where_a_unit_works_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = QuantLayer(nn.Conv2d(3, 3, 3, padding=1), LSQWeight(4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu_(x) + self.conv(x)

    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), InPlace(), nn.Conv2d(3, 3, 1)).eval(), torch.randn(4, 3, 8, 8)
    (unit,) = units(model, x[:1])
    ((_, features),) = walk(model, float_copy(model), [unit], x)
    before = features.given.clone()
    assert (before < 0).any()
    outputs(model, unit, features.given)
    assert torch.equal(features.given, before)


def test_mending_leaves_modes_phase_and_random_numbers_as_they_were(quantized, images) -> None:
    quantized.train()
    quantized.down[1].eval()
    quantized.head.layer.weight.requires_grad_(False)
    rest(quantized)
    modes = [module.training for module in quantized.modules()]
    learns = [parameter.requires_grad for parameter in quantized.parameters()]
    state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in quantized.named_buffers()}
    with mending(quantized, 7):
        assert torch.initial_seed() == 7
        assert not rests(quantized)
        assert not any(module.training for module in quantized.modules())
        with learning([quantized.stem[0].layer.weight]):
            quantized(images).sum().backward()
            assert [name for name, p in quantized.named_parameters() if p.grad is not None] == ["stem.0.layer.weight"]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in quantized.modules()] == modes
    assert [parameter.requires_grad for parameter in quantized.parameters()] == learns
    assert all(parameter.grad is None for parameter in quantized.parameters())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in quantized.named_buffers())


def test_the_loop_minimizes_and_each_group_goes_at_its_rate() -> None:
    data = torch.randn(40, 2)
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    seen: list[tuple[int, int]] = []

    def loss(picked: Tensor, iteration: int) -> Tensor:
        seen.append((len(picked.unique()), iteration))
        return (data[picked] - 3 - a).square().mean() + (data[picked] + 2 - b).square().mean()

    minimize(loss, [Learned([a], 0.1), Learned([b], 1e-4, cosine=True), Learned([], 1.0)], 40, 16, 200, "test")
    assert seen == [(16, iteration) for iteration in range(1, 201)]
    torch.testing.assert_close(a.detach(), data.mean(0) - 3, rtol=0, atol=0.3)
    assert 0 < b.detach().max() <= 200 * 1e-4 / 2 * 1.05  # a cosine's mean is one half


def test_what_makes_an_error_larger_is_taken_back() -> None:
    p = nn.Parameter(torch.ones(3))

    def change(by: float) -> None:
        p.data.add_(by)

    def size() -> float:
        return float(p.detach().abs().sum())

    assert kept_if_better([p], size, lambda: change(1.0)) == Errors(3.0, 3.0)
    assert torch.equal(p.detach(), torch.ones(3))
    assert kept_if_better([p], size, lambda: change(-1.0)) == Errors(3.0, 0.0)
    assert kept_if_better([p], size, lambda: change(float("nan"))).after == 0.0
    assert torch.equal(p.detach(), torch.zeros(3))


def test_the_error_of_a_unit_is_over_all_images(quantized, images) -> None:
    unit, features = next(iter(walk(quantized, float_copy(quantized), units(quantized, images[:1]), images)))
    with torch.no_grad():
        expected = distance(unit.parts(quantized)(images), features.target)
    assert error(quantized, unit, features) == pytest.approx(expected.item(), rel=1e-6)


def test_of_several_outputs_the_main_one_counts() -> None:
    assert torch.equal(scores({"main": torch.ones(2, 3), "aux": torch.zeros(2, 3)}), torch.ones(2, 3))
