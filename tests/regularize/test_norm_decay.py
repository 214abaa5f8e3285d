"""Norm decay against the official code's numbers, and what must be true of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.data import Data, Normalize
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, identical, tiny_network
from galago.method import Method
from galago.norms import L1, Linf, operators
from galago.prune.compact import CompactStructure
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.norm_decay import NormDecay, refreshed
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "norm_decay.npz")
BETA, MOMENTUM, RATE = (float(GOLDEN[f"decay_{name}"]) for name in ("beta", "momentum", "lr"))
LINEAR = {"linear_l1", "linear_linf"}


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


class OneImage(Data):
    """Nothing but an example of a size, C×H×W."""

    batch_size, classes = 1, ("one",)

    def __init__(self, *size: int) -> None:
        self.size, self.normalize = size, Normalize([0.0], [1.0])

    def example(self) -> Tensor:
        return torch.zeros(1, *self.size, dtype=torch.float64)

    def train(self, epoch: int = 0, start: int = 0) -> list:
        return []

    def validation(self) -> list:
        return []


def one_layer(case: str) -> tuple[nn.Module, Data]:
    weight = golden(f"decay_{case}_weight0")
    if case in LINEAR:
        layer: nn.Module = nn.Linear(6, 4, bias=False)
        data = OneImage(6)
    else:
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, 2 if case == "l1_s2" else 1, 1, bias=False)
        data = OneImage(weight.shape[1], *((7, 7) if case == "l1_s2" else (6, 6)))
    layer.weight = nn.Parameter(weight.clone())
    return layer, data


@pytest.mark.parametrize("case", ["l1_s1", "l1_s2", "linf", "linear_l1", "linear_linf"])
def test_six_steps_are_those_of_the_official_code(case: str) -> None:
    layer, data = one_layer(case)
    norm = Linf() if case.endswith("linf") else L1()
    model = nn.Sequential(layer)
    method = NormDecay(BETA, MOMENTUM, norm)
    method.prepare(model, data)
    operator = operators(model, data.example())["0"]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(6):
        assert float(norm(layer.weight.detach(), operator)) == pytest.approx(float(golden(f"decay_{case}_norm{step}")))
        layer.weight.grad = golden(f"decay_{case}_task_grad{step}").clone()
        method.update(model, optimizer.step)
        torch.testing.assert_close(method.kept["0"], golden(f"decay_{case}_buffer{step}"), rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.weight.grad, golden(f"decay_{case}_grad{step}"), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(layer.weight.detach(), golden(f"decay_{case}_weight6"), rtol=1e-9, atol=1e-12)


def test_a_buffer_holds_a_sign_while_it_is_in_the_largest_sum_and_halves_afterwards() -> None:
    weight, chosen = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([True, False, False])
    first = refreshed(torch.zeros(3), weight, chosen, 0.5)
    assert torch.equal(refreshed(first, weight, chosen, 0.5), first)
    assert refreshed(first, weight, ~chosen, 0.5).tolist() == [0.5, -1.0, 0.0]


@pytest.mark.parametrize("norm", [L1(), Linf()])
def test_without_a_task_every_norm_falls_to_nearly_nothing(norm) -> None:
    model, data = tiny_network(), TinyImages()
    method = NormDecay(1.0, 0.0, norm)
    method.prepare(model, data)
    found = operators(model, data.normalize(data.example()))
    optimizer = torch.optim.SGD(model.parameters(), lr=5e-3)
    heights = []
    for _ in range(1600):
        heights.append([float(norm(model.get_submodule(p).weight.detach(), o)) for p, o in found.items()])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.update(model, optimizer.step)
    heights = torch.tensor(heights)
    assert (heights[::20].diff(dim=0) < 0.1).all(), "by no more than a step's overshoot"
    assert (heights[-1] < 0.1 * heights[0]).all()


def trial(make_methods, saved=None) -> Trial:
    return Trial(tiny_network, classify(), TinyImages(), make_methods, saved)


@pytest.mark.parametrize(
    "make_others",
    [
        list,
        lambda: [Quantize(LSQWeight(4), LSQ(4))],
        lambda: [CutMix()],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_it_trains_and_exports_beside_other_methods(make_others, first: bool) -> None:
    def methods() -> list[Method]:
        return [NormDecay(0.1), *make_others()] if first else [*make_others(), NormDecay(0.1)]

    started = trial(methods)
    before = clone(dict(started.learner.model.named_parameters()))
    for number in range(2):
        started.step(number)
    after = dict(started.learner.model.named_parameters())
    assert not torch.equal(after[next(iter(before))], before[next(iter(before))])
    assert exported(finish(started.learner), started.image()).isfinite().all()


def test_quantized_layers_are_found_by_their_float_weight() -> None:
    started = trial(lambda: [Quantize(LSQWeight(4), LSQ(4)), NormDecay(0.1)])
    started.step(0)
    (decay,) = (idea for idea in started.learner.ideas if isinstance(idea, NormDecay))
    assert len(decay.kept) == 5
    assert all(buffer.any() for buffer in decay.kept.values())


def test_channels_may_be_cut_out_and_the_training_resumed_in_any_order() -> None:
    for order in (slice(None), slice(None, None, -1)):
        methods = partial(lambda order: [NormDecay(0.1), CompactStructure(0.6, until=0.0)][order], order)
        straight = trial(methods)
        for number in (0, 1):
            straight.step(number)
        saved = straight.save()
        straight.step(2)
        resumed = trial(methods, saved)
        resumed.step(2)
        assert identical(straight.learner.state_dict(), resumed.learner.state_dict())
        assert exported(finish(straight.learner), straight.image()).isfinite().all()


def test_frozen_layers_and_their_buffers_are_left_alone() -> None:
    model, data = tiny_network(), TinyImages()
    frozen = next(path for path, part in model.named_modules() if isinstance(part, nn.Conv2d))
    model.get_submodule(frozen).requires_grad_(False)
    method = NormDecay(0.1)
    method.prepare(model, data)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    method.update(model, lambda: None)
    assert len(method.kept) == 4
    assert frozen not in method.kept


def test_senseless_arguments_and_networks_are_refused() -> None:
    with pytest.raises(UserError, match="weight -1"):
        NormDecay(weight=-1)
    with pytest.raises(UserError, match="momentum 1"):
        NormDecay(momentum=1)
    with pytest.raises(UserError, match="finds no convolution"):
        NormDecay().prepare(nn.Flatten(), TinyImages())


@pytest.mark.parametrize("norm", [L1(), Linf()])
def test_the_laws_of_methods_hold(norm) -> None:
    check_method(lambda: NormDecay(norm=norm))
