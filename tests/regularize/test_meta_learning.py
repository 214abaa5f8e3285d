"""A step on one half of a batch that is to help the other: golden vectors, brute force, and what stays untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.method import Forward, Method
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.meta_learning import MLTP, halves, rate_factors, virtual_step
from galago.schedule import Constant
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "mltp.npz")
ALPHA, BETA = float(GOLDEN["alpha"]), float(GOLDEN["beta"])
ORDERS = pytest.mark.parametrize(("second_order", "name"), [(True, "second_order"), (False, "first_order")])


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def method(second_order: bool | None, beta: float = BETA, rate: float = ALPHA) -> MLTP:
    return MLTP(beta, rate, Constant(), second_order)


def network() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(golden(f"mlp_param{number}"))
    return net


def task(name: str) -> Batch:
    return Batch(golden(f"mlp_x{name}"), torch.eye(3, dtype=torch.float64)[golden(f"mlp_y{name}")])


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


@ORDERS
def test_the_gradient_of_two_quadratics_is_the_golden_one_and_the_closed_form(second_order: bool, name: str) -> None:
    a, b, c, theta = (golden(f"quadratic_{part}") for part in ("A", "B", "c", "theta"))
    theta = theta.clone().requires_grad_()
    current = theta @ a @ theta / 2
    moved = virtual_step(current, {"theta": theta}, {"theta": ALPHA}, second_order)["theta"]
    loss = current + BETA * ((moved - c) @ b @ (moved - c) / 2)
    (found,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(loss, golden("quadratic_loss"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, golden(f"quadratic_grad_{name}"), rtol=1e-10, atol=1e-10)
    later = BETA * b @ (theta - ALPHA * a @ theta - c)
    closed = a @ theta + (later - ALPHA * a @ later if second_order else later)
    torch.testing.assert_close(found, closed.detach(), rtol=1e-10, atol=1e-10)


@ORDERS
def test_losses_and_gradients_of_a_network_are_the_golden_ones(second_order: bool, name: str) -> None:
    net = network()
    step = method(second_order).learn(task("a"), task("b"), Forward(net, Classify(3)))
    assert step.losses.keys() == {"cross_entropy", "cross_entropy_after_step"}
    torch.testing.assert_close(step.losses["cross_entropy"], golden("mlp_loss_a"))
    torch.testing.assert_close(step.losses["cross_entropy_after_step"], golden("mlp_loss_b_after_virtual_step"))
    for number, found in enumerate(gradients(net, torch.stack(list(step.losses.values())).sum())):
        torch.testing.assert_close(found, golden(f"mlp_grad_{name}{number}"), rtol=1e-9, atol=1e-12)


def test_second_order_is_the_slope_that_finite_differences_find() -> None:
    net = network()
    losses = method(second_order=True).learn(task("a"), task("b"), Forward(net, Classify(3))).losses
    found = gradients(net, torch.stack(list(losses.values())).sum())
    theta = {name: own.detach().clone() for name, own in net.named_parameters()}

    def total(moved: dict[str, Tensor]) -> float:
        moved = {name: own.clone().requires_grad_() for name, own in moved.items()}
        cross_entropy = nn.functional.cross_entropy
        now = cross_entropy(functional_call(net, moved, (task("a").input,)), task("a").target)
        slopes = torch.autograd.grad(now, list(moved.values()))
        there = {name: own - ALPHA * slope for (name, own), slope in zip(moved.items(), slopes, strict=True)}
        later = cross_entropy(functional_call(net, there, (task("b").input,)), task("b").target)
        return (now + BETA * later).item()

    torch.manual_seed(0)
    direction = {name: torch.randn_like(own) for name, own in theta.items()}
    width = 1e-5
    ends = [total({name: own + side * width * direction[name] for name, own in theta.items()}) for side in (1, -1)]
    slope = sum((own * its).sum().item() for own, its in zip(found, direction.values(), strict=True))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * width), rel=1e-5)


@pytest.mark.parametrize("second_order", [True, False])
def test_without_a_step_on_trial_it_is_ordinary_training_on_both_halves(second_order: bool) -> None:
    net = network()
    both = [nn.functional.cross_entropy(net(task(name).input), task(name).target) for name in "ab"]
    expected = gradients(net, both[0] + 0.7 * both[1])
    step = method(second_order, beta=0.7, rate=0.0).learn(task("a"), task("b"), Forward(net, Classify(3)))
    for found, wanted in zip(gradients(net, step.loss), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_without_a_new_task_it_is_ordinary_training_on_the_first_half() -> None:
    net = network()
    expected = gradients(net, nn.functional.cross_entropy(net(task("a").input), task("a").target))
    step = method(second_order=True, beta=0.0).learn(task("a"), task("b"), Forward(net, Classify(3)))
    for found, wanted in zip(gradients(net, step.loss), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


def test_parameters_are_the_same_objects_and_bits_and_running_statistics_follow_the_first_half_once() -> None:
    torch.manual_seed(0)
    net, alone = tiny_network().train(), tiny_network().train()
    alone.load_state_dict(net.state_dict())
    before = [(own, own.detach().clone()) for own in net.parameters()]
    data = TinyImages()
    batch = next(iter(data.train()))
    batch = batch._replace(input=data.normalize(batch.input))
    step = MLTP().step(batch, Forward(net, classify()))
    step.loss.backward()
    for now, (own, value) in zip(net.parameters(), before, strict=True):
        assert now is own
        assert torch.equal(now, value)
    alone(halves(batch)[0].input)
    for (name, found), (_, expected) in zip(net.named_buffers(), alone.named_buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_what_stands_before_it_sees_the_batch_whole_and_in_order() -> None:
    net = tiny_network()
    images, targets = torch.randn(5, 3, 8, 8), torch.eye(3)[[0, 1, 2, 0, 1]]
    batch = Batch(images, targets, {"index": torch.arange(5)})
    step = method(second_order=False, rate=0.0).step(batch, Forward(net.eval(), classify()))
    assert torch.equal(step.batch.input, images)
    assert torch.equal(step.batch.target, targets)
    assert step.batch.extra["index"].tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(step.output, net(images))
    first, second = halves(batch)
    assert (len(first.input), len(second.input)) == (3, 2)


def test_the_step_on_trial_is_as_long_as_the_schedule_says_at_that_moment() -> None:
    class Linear(Constant):
        def __call__(self, progress: float) -> float:
            return 1 - progress

    losses = []
    for schedule, progress, rate in ((Linear(), 0.75, 0.4), (Constant(), 0.0, 0.1)):
        inner = Forward(network(), Classify(3), progress=progress)
        step = MLTP(rate=rate, schedule=schedule).learn(task("a"), task("b"), inner)
        losses.append(step.loss.item())
    assert losses[0] == losses[1]


def test_parameters_that_ask_for_a_rate_of_their_own_have_it_in_the_step_on_trial() -> None:
    class Slow(nn.Linear):
        def own_rates(self) -> tuple[float, float | None]:
            return 0.5, None

    net = nn.Sequential(nn.Linear(2, 2), Slow(2, 2))
    assert rate_factors(net) == {"0.weight": 1.0, "0.bias": 1.0, "1.weight": 0.5, "1.bias": 0.5}


def test_large_and_quantized_networks_learn_by_first_order() -> None:
    assert MLTP().exact(nn.Linear(999, 1000))
    assert not MLTP().exact(nn.Linear(1000, 1000))
    assert MLTP(second_order=True).exact(nn.Linear(1000, 1000))
    quantized = Trial(tiny_network, classify(), TinyImages(), lambda: [Quantize(LSQWeight(4), EWGS(4))]).learner.model
    assert not MLTP().exact(quantized)
    with pytest.raises(UserError, match="quantizers have no second derivative"):
        MLTP(second_order=True).exact(quantized)


@pytest.mark.parametrize("others", [[], [CutMix(probability=1.0)], [Quantize(LSQWeight(4), EWGS(4))]], ids=str)
def test_it_trains_with_mixing_and_with_quantizers_and_exports(others: list[Method]) -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [MLTP(), *others])
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def test_a_short_step_on_trial_rewards_gradients_that_agree() -> None:
    net, rate = network(), 1e-5
    plain = [nn.functional.cross_entropy(net(task(name).input), task(name).target) for name in "ab"]
    one, other = (torch.cat([part.flatten() for part in gradients(net, loss)]) for loss in plain)
    later = method(True, rate=rate).learn(task("a"), task("b"), Forward(net, Classify(3))).losses
    gained = (plain[1] - later["cross_entropy_after_step"]).item() / rate
    assert gained == pytest.approx((one @ other).item(), rel=1e-3)


def test_a_batch_that_cannot_be_halved_and_impossible_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="make batch_size larger"):
        MLTP().step(Batch(torch.zeros(1, 3, 8, 8), torch.eye(3)[:1]), Forward(tiny_network(), classify()))
    with pytest.raises(UserError, match="beta is -1"):
        MLTP(beta=-1.0)


@pytest.mark.parametrize("second_order", [True, False])
def test_it_obeys_the_laws(second_order: bool) -> None:
    check_method(lambda: MLTP(second_order=second_order))
