"""Groups of channels: the identities of one group and of one a channel, the search, the learning, and the export."""

from __future__ import annotations

import copy
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.layers import find
from galago.probe import Deployed
from galago.quantize.group_wise import Arrangement, GroupWiseWeight, best_split, best_steps, groups_of
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.tasks.classify import Classify
from galago.testing import check_quantizer
from galago.train import train
from samples import SmallNet, Stripes


def uneven(channels: int = 24, *shape: int) -> Tensor:
    """A weight whose channels' ranges differ by up to fifty times."""
    size = torch.logspace(-1.2, 0.5, channels)[torch.randperm(channels)]
    return torch.randn(channels, *(shape or (6, 3, 3))) * size.view(-1, *[1] * (len(shape) or 3))


def made(weight: Tensor, groups: int, bits: int = 4, arrangement: Arrangement = Arrangement.sorted) -> GroupWiseWeight:
    quantizer = GroupWiseWeight(bits, groups, arrangement)
    quantizer.initialize(weight)
    return quantizer


def error(quantizer: GroupWiseWeight, weight: Tensor, power: float = 2.4) -> float:
    return float((quantizer(weight).detach() - weight).abs().double().pow(power).mean())


@pytest.mark.parametrize("arrangement", Arrangement)
@pytest.mark.parametrize(("groups", "per_channel"), [(24, True), (99, True), (1, False)])
def test_a_group_a_channel_and_one_group_are_the_quantizers_that_lsq_has(groups, per_channel, arrangement):
    weight = uneven().requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    quantizer, lsq = made(weight.detach(), groups, arrangement=arrangement), LSQWeight(4, per_channel)
    lsq.initialize(weight.detach())
    grid = quantizer.grid()
    lsq.step.data = grid.scale.clone() if per_channel else grid.scale[0]
    y, expected, g = quantizer(weight), lsq(twin), torch.randn(weight.shape)
    assert torch.equal(y, expected)
    assert torch.equal(quantizer.codes(weight), lsq.codes(twin))
    y.backward(g)
    expected.backward(g)
    assert torch.equal(weight.grad, twin.grad)
    found = quantizer.step.grad[quantizer.group] if per_channel else quantizer.step.grad[0]
    torch.testing.assert_close(found, lsq.step.grad, rtol=1e-4, atol=1e-6)


def brute_force_step(weights: Tensor, bits: int) -> float:
    low, high = -(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1
    best, least = 0.0, float("inf")
    for percent in range(100, 19, -1):
        step = percent / 100 * float(weights.abs().max()) / ((high - low) / 2)
        rounded = (weights.double() / step).round().clamp(low, high) * step
        found = float((rounded - weights).abs().pow(2.4).sum())
        if found < least:
            best, least = step, found
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_groups_step_is_the_one_a_plain_search_finds(bits):
    weight = uneven(10)
    quantizer = made(weight, 3, bits)
    for number, step in enumerate(quantizer.step.tolist()):
        assert step == pytest.approx(brute_force_step(weight[quantizer.group == number], bits), rel=1e-5)


@pytest.mark.parametrize("arrangement", [Arrangement.contiguous, Arrangement.sorted])
@pytest.mark.parametrize("bits", [2, 4])
def test_finer_groups_never_round_worse(bits, arrangement):
    for seed in range(5):
        torch.manual_seed(seed)
        weight = uneven()
        errors = [error(made(weight, groups, bits, arrangement), weight) for groups in (1, 2, 4, 8, 24)]
        assert all(finer <= coarser * 1.01 for coarser, finer in pairwise(errors)), errors
        assert errors[-1] < 0.8 * errors[0]


def test_groups_of_similar_channels_round_better_than_groups_of_neighbors():
    weight = uneven()
    contiguous, ordered, clustered = (error(made(weight, 4, 4, how), weight, 2) for how in Arrangement)
    assert ordered < contiguous
    assert clustered < contiguous


def test_the_split_is_the_best_of_all():
    for seed in range(20):
        torch.manual_seed(seed)
        numbers = torch.randn(7).double().sort().values
        for groups in (1, 2, 3, 7):
            found = best_split(numbers, groups)
            assert found.unique().tolist() == list(range(groups))
            assert spread(numbers, found) == pytest.approx(
                min(spread(numbers, assigned(7, cuts)) for cuts in combinations(range(1, 7), groups - 1)), abs=1e-12
            )


def assigned(count: int, cuts: tuple[int, ...]) -> Tensor:
    return torch.tensor([sum(place >= cut for cut in cuts) for place in range(count)])


def spread(numbers: Tensor, group: Tensor) -> float:
    parts = [numbers[group == one] for one in group.unique()]
    return sum(float((part - part.mean()).square().sum()) for part in parts)


@pytest.mark.parametrize("arrangement", Arrangement)
@pytest.mark.parametrize("ranges", [torch.rand(13), torch.zeros(13), torch.ones(13), torch.arange(13.0) - 0.0])
def test_no_group_is_empty_and_sorted_ones_are_equally_large(ranges, arrangement):
    for groups in (1, 2, 5, 13):
        group = groups_of(ranges, groups, arrangement)
        sizes = group.bincount(minlength=groups)
        assert sizes.min() >= 1
        assert len(sizes) == groups
        assert arrangement is Arrangement.clustered or sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("arrangement", Arrangement)
def test_the_order_of_channels_does_not_matter_to_what_each_becomes(arrangement):
    """For groups formed by range: a permuted layer is the layer, permuted."""
    weight, order = uneven(), torch.randperm(24)
    plain, permuted = made(weight, 4, arrangement=arrangement), made(weight[order], 4, arrangement=arrangement)
    same = torch.equal(plain(weight)[order], permuted(weight[order]))
    assert same == (arrangement is not Arrangement.contiguous)


def test_the_gradient_of_a_shared_step_is_the_closed_form_element_by_element():
    weight, g = uneven(6, 5).double(), torch.randn(6, 5).double()
    quantizer = made(weight, 2).double()
    quantizer(weight).backward(g)
    expected, members = [0.0, 0.0], [0, 0]
    for channel, number in enumerate(quantizer.group.tolist()):
        step = quantizer.step[number].item()
        for value, slope in zip(weight[channel].tolist(), g[channel].tolist(), strict=True):
            scaled = value / step
            expected[number] += slope * (-8 if scaled <= -8 else 7 if scaled >= 7 else round(scaled) - scaled)
            members[number] += 1
    for number in (0, 1):
        wanted = expected[number] / (members[number] * 7) ** 0.5
        assert quantizer.step.grad[number].item() == pytest.approx(wanted, rel=1e-6)


def test_a_step_driven_below_zero_and_weights_of_zero_do_no_harm():
    quantizer = made(torch.zeros(5, 3), 2)
    assert (quantizer.grid().scale > 0).all()
    quantizer.step.data.fill_(-1.0)
    x = torch.randn(5, 3, requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer.step.grad.isfinite().all()
    assert (best_steps(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64), 1, -8, 7) > 0).all()


@pytest.mark.parametrize(("bits", "arrangement"), list(zip((2, 4, 8), Arrangement, strict=True)))
def test_it_obeys_the_laws_of_a_quantizer(bits, arrangement):
    check_quantizer(lambda: GroupWiseWeight(bits, 3, arrangement), for_weights=True, idempotent=True)


def test_the_compiler_takes_a_training_step_in_one_piece_and_gets_the_same():
    torch.compiler.reset()
    layer = QuantLayer(nn.Conv2d(5, 6, 3), GroupWiseWeight(4, 2, Arrangement.sorted), LSQ(4))
    x = torch.randn(3, 5, 8, 8).relu()
    layer.observe(x)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    g = torch.randn_like(layer(x))
    for run in (layer, compiled):
        run(x).backward(g)
    for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_trained_exported_and_verified_each_channel_has_its_groups_scale(tmp_path: Path):
    data, task = Stripes(), Classify(2)
    methods = [Quantize(GroupWiseWeight(4, 3, Arrangement.clustered), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))]
    model = train(SmallNet(), task, data, tmp_path, epochs=3, methods=methods)
    layer = find(model, "conv2")
    assert isinstance(layer, QuantLayer)
    assert isinstance(layer.weight_quantizer, GroupWiseWeight)
    assert layer.weight_quantizer.grid().scale.shape == (7,)
    assert len(layer.weight_quantizer.grid().scale.unique()) == 3
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize(
    ("make", "text"), [(lambda: GroupWiseWeight(1), "2 to 8"), (lambda: GroupWiseWeight(4, 0), "groups is 0")]
)
def test_impossible_numbers_are_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()
