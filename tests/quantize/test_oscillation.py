"""Weights that oscillate: what is counted, what is frozen and held, and what draws them to their levels."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from galago.batch import Batch, Step
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import Deployed
from galago.quantize.calibrated import CalibratedWeight
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.group_wise import GroupWiseWeight
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.oscillation import (
    DampenOscillations,
    FreezeOscillations,
    Tracked,
    distance_to_levels,
    latent,
    rising,
)
from galago.quantize.quantize import Quantize
from galago.quantize.rest import rest
from galago.quantize.rounding import weight_quantized, weight_quantizer_of
from galago.recipe import Parts
from galago.schedule import Constant
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from samples import SmallNet, StopAt, Stopped, Stripes, quantized_tiny_network

AFFINE = (LSQWeight, CalibratedWeight, GroupWiseWeight, MinMaxWeight, EWGSWeight)


def set_up(kind, bits: int = 3):
    quantizer, weight = kind(bits), torch.randn(6, 5, 3, 3)
    quantizer.initialize(weight)
    return quantizer, weight


@pytest.mark.parametrize("kind", AFFINE)
def test_the_value_a_weight_is_drawn_to_is_rounded_to_the_weights_own_integer(kind):
    quantizer, weight = set_up(kind)
    codes = quantizer.codes(weight)
    assert torch.equal(quantizer.codes(latent(codes, quantizer)), codes)
    if not quantizer.normalized:
        torch.testing.assert_close(latent(codes, quantizer), quantizer(weight).detach())


@pytest.mark.parametrize("kind", [LSQWeight, CalibratedWeight])
def test_distance_and_gradient_are_the_formula_weight_by_weight(kind):
    quantizer, weight = set_up(kind)
    weight = weight.double().requires_grad_()
    distance_to_levels(weight, quantizer).square().sum().backward()
    grid, rounded = quantizer.grid(), quantizer(weight.detach().float()).detach()
    for channel, scale in enumerate(grid.scale.tolist()):
        triples = zip(
            weight[channel].detach().flatten().tolist(),
            rounded[channel].flatten().tolist(),
            weight.grad[channel].flatten().tolist(),
            strict=True,
        )
        for w, level, slope in triples:
            inside = grid.low * scale <= w <= grid.high * scale
            assert slope == pytest.approx(2 * (w - level) if inside else 0.0, abs=1e-5)


def test_lambda_rises_as_half_a_cosine_and_the_threshold_falls():
    assert [rising(p) for p in (0.0, 0.25, 1.0)] == pytest.approx([0, 0.5 * (1 - math.cos(math.pi / 4)), 1])
    method = FreezeOscillations(0.04, 0.01)
    thresholds = []
    for progress in (0.0, 0.5, 1.0):
        method.progress = progress
        thresholds.append(method.threshold)
    assert thresholds == pytest.approx([0.04, 0.025, 0.01])


def reference(codes: list[float], momentum: float, threshold: float) -> tuple[float, float, float | None]:
    """Frequency, average and the integer frozen at, of one weight, in plain Python."""
    before, direction, frequency, average = codes[0], 0.0, 0.0, codes[0]
    for code in codes[1:]:
        change = (code > before) - (code < before)
        frequency += momentum * (float(change * direction < 0) - frequency)
        average += momentum * (code - average)
        direction = change or direction
        before = code
        if frequency > threshold:
            return frequency, average, round(average)
    return frequency, average, None


def test_frequency_average_and_freezing_are_those_of_a_plain_loop():
    course = torch.randint(-1, 3, (60, 40)).float().cumsum(0).remainder(5)
    course[:, :10] = course[:1, :10]  # never change
    course[:, 10:20] = torch.arange(60.0)[:, None]  # change, but never back
    course[:, 20:30] = torch.arange(60.0)[:, None] % 2  # always back
    tracked = Tracked(course[0])
    for codes in course[1:]:
        tracked.follow(codes, momentum=0.1, threshold=0.45)
    for weight in range(40):
        frequency, average, fixed = reference(course[:, weight].tolist(), 0.1, 0.45)
        assert bool(tracked.frozen[weight]) == (fixed is not None)
        if fixed is None:
            assert tracked.frequency[weight].item() == pytest.approx(frequency, abs=1e-5)
            assert tracked.average[weight].item() == pytest.approx(average, rel=1e-5)
        else:
            assert tracked.codes[weight].item() == fixed
    assert not tracked.frozen[:20].any()
    assert tracked.frozen[20:30].all()


def test_grids_without_a_zero_freeze_on_odd_integers():
    tracked = Tracked(torch.tensor([1.0]))
    for turn in range(1, 40):
        tracked.follow(torch.tensor([1.0 if turn % 2 == 0 else -1.0]), 0.1, 0.3, step=2)
    assert tracked.frozen.all()
    assert tracked.codes.item() in (-1.0, 1.0)


class Pulled(nn.Module):
    """One quantized linear layer whose best weights lie between two levels."""

    def __init__(self, weight) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = QuantLayer(nn.Linear(8, 4, bias=False), weight)
        self.quantizer = weight_quantizer_of(self.layer)
        self.weight = self.layer.layer.weight
        grid = self.quantizer.grid()
        self.goal = latent(torch.randint(-2, 2, (4, 8)) + torch.rand(4, 8), self.quantizer)
        self.scale = grid.scale

    def train_by(self, method: Method | None, steps: int = 200, learn_scale: bool = False) -> list[Tensor]:
        """The weights' integers over time."""
        parameters = list(self.parameters()) if learn_scale else [self.weight]
        optimizer = SGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4)
        seen = []
        if method is not None:
            method.prepare(self, Stripes())
        for number in range(steps):
            optimizer.zero_grad()
            rounded = self.quantizer(self.weight)
            loss = (rounded - self.goal).square().sum()
            if isinstance(method, DampenOscillations):
                forward = Forward(self, Classify(2), (), number / steps)
                loss = method.step(Batch(torch.zeros(1), None), Fixed(forward, loss)).loss
            if isinstance(method, FreezeOscillations):
                method.progress = number / steps
            loss.backward()
            (optimizer.step if method is None else lambda: method.update(self, optimizer.step))()
            seen.append(self.quantizer.codes(self.weight).clone())
        return seen


class Fixed:
    """Stands for the rest of a forward pass."""

    def __init__(self, forward: Forward, loss: Tensor) -> None:
        self.model, self.progress, self.loss = forward.model, forward.progress, loss

    def __call__(self, batch: Batch) -> Step:
        return Step(batch, None, {"pull": self.loss})


def flips(seen: list[Tensor], last: int = 50) -> float:
    """Share of integers that changed in a step, over the last steps."""
    return sum(float((b != a).float().mean()) for a, b in zip(seen[-last:], seen[-last + 1 :], strict=False)) / last


@pytest.mark.parametrize("kind", [LSQWeight, GroupWiseWeight])
def test_both_cures_end_the_oscillations(kind):
    plain = flips(Pulled(kind(3)).train_by(None))
    damped = flips(Pulled(kind(3)).train_by(DampenOscillations(20.0)))
    frozen = flips(Pulled(kind(3)).train_by(FreezeOscillations()))
    assert plain > 0.1
    assert damped < plain / 3
    assert frozen < plain / 10


def test_frozen_weights_stay_whatever_momentum_does_and_move_with_the_scale():
    pulled, method = Pulled(LSQWeight(3)), FreezeOscillations()
    pulled.train_by(method, learn_scale=True)
    (tracked,) = method.tracked
    frozen, codes, scale = tracked.frozen.clone(), tracked.codes.clone(), pulled.quantizer.step.detach().clone()
    assert 0.1 < method.frozen_share() <= 1
    optimizer = SGD([pulled.weight, pulled.quantizer.step], lr=0.1, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        (pulled.quantizer(pulled.weight) * 3).sum().backward()
        method.update(pulled, optimizer.step)
    assert not torch.equal(pulled.quantizer.step, scale)
    held = pulled.quantizer.codes(pulled.weight)
    assert torch.equal(held[frozen], codes[frozen])
    values = pulled.quantizer.grid().values(codes)
    assert torch.equal(pulled.weight.detach()[frozen], values[frozen])
    assert not torch.equal(held[~frozen], codes[~frozen])


def test_a_network_at_rest_is_neither_damped_nor_counted():
    model, data = quantized_tiny_network(), Stripes()
    freeze, dampen = FreezeOscillations(), DampenOscillations()
    for method in (freeze, dampen):
        method.prepare(model, data)
    rest(model)
    before = copy.deepcopy(freeze.state_dict())
    (layer,) = weight_quantized(model).values()
    freeze.update(model, lambda: layer.layer.weight.data.mul_(-1))
    assert all(torch.equal(before[name], tensor) for name, tensor in freeze.state_dict().items())
    step = dampen.step(Batch(torch.zeros(1), None), Fixed(Forward(model, Classify(2)), torch.zeros(())))
    assert step.losses.keys() == {"pull"}


@pytest.mark.parametrize("make", [DampenOscillations, lambda: FreezeOscillations(1e-4, 1e-5, 0.5)])
def test_they_obey_the_laws_of_a_method(make):
    check_method(make, make_model=quantized_tiny_network)


def run(folder: Path, weight=LSQWeight, inputs=LSQ, **options) -> tuple[nn.Module, FreezeOscillations]:
    torch.manual_seed(0)
    freeze = FreezeOscillations(1e-3, 1e-3, 0.2)
    edges = {"edge_weight": MinMaxWeight(4), "edge_input": MinMax(8)}
    methods = [Quantize(weight(3), inputs(3), stream=MinMax(8), **edges), freeze, DampenOscillations(0.1), StopAt()]
    options = {"optimizer": lambda p: SGD(p, lr=0.2, momentum=0.9), "schedule": Constant(), "epochs": 4, **options}
    return train(SmallNet(), Classify(2), Stripes(), folder, methods=methods, **options), freeze


def test_killed_and_resumed_it_equals_a_run_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, freeze = run(tmp_path / "whole", checkpoint_every=1)
    assert 0 < freeze.frozen_share() < 1
    for at in (5, 7):  # of 12 batches, three an epoch
        monkeypatch.setattr(StopAt, "at", at)
        with pytest.raises(Stopped):
            run(tmp_path / str(at), checkpoint_every=1)
        monkeypatch.setattr(StopAt, "at", 0)
        again, other = run(tmp_path / str(at), checkpoint_every=1)
        assert all(
            torch.equal(x, y) for x, y in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        )
        assert all(
            torch.equal(x, y) for x, y in zip(freeze.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_a_network_with_frozen_weights_exports_and_is_verified(tmp_path: Path):
    data, task = Stripes(), Classify(2)
    model, freeze = run(tmp_path, EWGSWeight, EWGS)
    assert freeze.frozen_share() > 0
    trained = Deployed(model, data.normalize, task).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(task, data, ()), images=32)
    assert outcome["passed"], outcome


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DampenOscillations(-1.0), "weight"),
        (lambda: FreezeOscillations(first_threshold=0.0), "first_threshold"),
        (lambda: FreezeOscillations(last_threshold=-0.1), "last_threshold"),
        (lambda: FreezeOscillations(momentum=0.0), "momentum"),
        (lambda: DampenOscillations().prepare(SmallNet(), Stripes()), "behind Quantize"),
        (lambda: FreezeOscillations().prepare(SmallNet(), Stripes()), "behind Quantize"),
    ],
)
def test_what_makes_no_sense_is_refused_in_plain_words(make, text):
    with pytest.raises(UserError, match=text):
        make()
