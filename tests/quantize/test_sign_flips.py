"""Counting flips: against a plain count, at rates where the answer is known, and what the paper says of Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify
from galago.layers import swap
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.reactnet import BinaryWeight, RSign, scaled_sign
from galago.quantize.sign_flips import SignFlipRatio, SignFlips
from galago.testing import check_method, check_probe, tiny_network


class Binary(nn.Module):
    """One binary convolution and a linear layer."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.width = width
        self.conv = QuantLayer(nn.Conv2d(3, width, 3, bias=False), BinaryWeight(), RSign(3))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def numbers(model: nn.Module) -> dict[str, float]:
    return SignFlipRatio()(Deployed(model, nn.Identity(), classify()), classify(), TinyImages())


def signs(model: nn.Module) -> Tensor:
    return torch.where(model.conv.layer.weight.detach() >= 0, 1.0, -1.0)


def test_numbers_are_those_of_a_plain_count():
    trial = Trial(Binary, classify(), TinyImages(), lambda: [SignFlips()])
    model = trial.learner.model
    trial.optimizer.param_groups[0].update(lr=5.0, base_lr=5.0)
    start, ratios = signs(model), []
    for number in range(3):
        before = signs(model)
        trial.step(number)
        ratios.append(((signs(model) - before).abs() / 2).mean().item())
    found = numbers(model)
    assert 0 < found["flip_flop_ratio"] == pytest.approx(sum(ratios) / 3)
    correlation = 1 - 2 * ((signs(model) - start).abs() / 2).mean().item()
    assert found["sign_correlation"] == pytest.approx(correlation)
    model = trial.learner.ideas[0].epoch(model, 1)
    assert numbers(model)["flip_flop_ratio"] == 0
    assert numbers(model)["sign_correlation"] == pytest.approx(correlation), "the start stays the start"


def test_at_a_learning_rate_of_zero_no_sign_turns():
    trial = Trial(Binary, classify(), TinyImages(), lambda: [SignFlips()])
    trial.optimizer.param_groups[0].update(lr=0.0)
    for number in range(2):
        trial.step(number)
    assert numbers(trial.learner.model) == {"flip_flop_ratio": 0.0, "sign_correlation": 1.0}


def test_weights_drawn_anew_do_not_correlate_with_the_start():
    model, method = Binary(400), SignFlips()
    method.prepare(model, TinyImages())
    method.update(model, lambda: model.conv.layer.reset_parameters())
    found, count = numbers(model), model.conv.layer.weight.numel()
    assert abs(found["sign_correlation"]) < 3 * 2 / math.sqrt(count)
    assert found["flip_flop_ratio"] == pytest.approx(0.5, abs=3 / math.sqrt(count))


@pytest.mark.parametrize("smaller", [1e-3, 1e-2])
def test_adam_revives_weights_with_tiny_gradients_and_plain_descent_does_not(smaller):
    """The mechanism that the paper claims for dead weights: Adam's step does not depend on the gradient's size."""

    def moved(optimizer: type, rate: float) -> tuple[float, float]:
        weight = torch.tensor([0.02, 0.02], requires_grad=True)
        stepper = optimizer([weight], lr=rate)
        for _ in range(10):
            stepper.zero_grad()
            (scaled_sign(weight, torch.ones(())) * torch.tensor([1.0, smaller])).sum().backward()
            stepper.step()
        return tuple((0.02 - weight.detach()).tolist())

    normal, tiny = moved(torch.optim.Adam, 3e-3)
    assert normal == pytest.approx(10 * 3e-3, rel=1e-3)
    assert tiny == pytest.approx(normal, rel=1e-3), "both signs have turned"
    normal, tiny = moved(torch.optim.SGD, 3e-3)
    assert tiny == pytest.approx(smaller * normal, rel=1e-3), "one sign has turned, the other weight is where it was"


def test_decay_within_adam_is_part_of_the_gradient():
    """Coupled L2, as in the paper: a weight whose gradient is nothing but decay moves as far as any other."""
    weight = torch.tensor([0.5, 0.005], requires_grad=True)
    stepper = torch.optim.Adam([weight], lr=1e-3, weight_decay=5e-6)
    weight.grad = torch.zeros(2)
    stepper.step()
    assert torch.allclose(0.5 - weight[0], torch.tensor(1e-3), rtol=0.01)


def binary_tiny_network() -> nn.Module:
    model = tiny_network()
    path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return swap(model, path, QuantLayer(layer, BinaryWeight(), RSign(layer.in_channels)))


def test_it_obeys_the_laws_of_a_method():
    check_method(SignFlips, make_model=binary_tiny_network)


def test_the_probe_obeys_the_laws_and_says_nothing_where_nothing_is_counted():
    check_probe(SignFlipRatio)
    assert numbers(tiny_network()) == {}


def test_nothing_is_left_in_the_finished_network():
    model, method = Binary(), SignFlips()
    names = model.state_dict().keys()
    method.prepare(model, TinyImages())
    assert model.state_dict().keys() != names
    assert method.finish(model).state_dict().keys() == names


def test_a_network_without_quantized_weights_is_refused():
    with pytest.raises(UserError, match="behind Quantize"):
        SignFlips().prepare(tiny_network(), TinyImages())
