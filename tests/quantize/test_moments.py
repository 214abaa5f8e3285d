"""Moments of rectified normal variables against random draws, and how far a network's BatchNorms carry them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.layers import flow
from galago.quantize.fold import fold_norm
from galago.quantize.moments import Moments, moments, rectified, relu_mean, relu_square


def test_the_mean_behind_a_relu_is_the_brute_force(golden):
    want = golden("ptq")
    found = relu_mean(want["relu_mean_beta"], want["relu_mean_gamma"])
    torch.testing.assert_close(found, want["relu_mean_expected"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("below", [None, 6.0])
def test_moments_are_those_of_random_draws(below):
    draws = 200_000
    beta = torch.tensor([-1.5, 0.0, 0.7, 3.0, 5.5, 9.0], dtype=torch.float64)
    gamma = torch.tensor([0.5, 1.0, 2.0, 0.1, 2.0, 1.5], dtype=torch.float64)
    y = (beta + gamma * torch.randn(draws, 6, dtype=torch.float64)).clamp(0, below)
    found = rectified(Moments(beta, gamma.square()), below)
    mean, variance = y.mean(0), y.var(0)
    assert ((found.mean - mean).abs() <= 3 * (variance / draws).sqrt() + 1e-12).all()
    fourth = (y - mean).pow(4).mean(0)
    assert ((found.variance - variance).abs() <= 3 * ((fourth - variance.square()) / draws).sqrt() + 1e-12).all()


def test_a_gain_of_zero_is_a_constant_and_the_sign_does_not_matter():
    beta = torch.tensor([-2.0, 0.0, 3.0])
    assert relu_mean(beta, torch.zeros(3)).tolist() == [0.0, 0.0, 3.0]
    assert relu_square(beta, torch.zeros(3)).tolist() == [0.0, 0.0, 9.0]
    assert torch.equal(relu_mean(beta, torch.ones(3)), relu_mean(beta, -torch.ones(3)))


class Net(nn.Module):
    """A residual sum, a concatenation, ReLU6, a pooling; and a tanh, which nothing is known of."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm_one = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.two, self.norm_two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.three, self.norm_three = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.relu, self.relu6, self.last, self.head = nn.ReLU(), nn.ReLU6(), nn.Conv2d(4, 2, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        one = self.relu(self.norm_one(self.one(x)))
        two = (self.norm_two(self.two(one)) + one).relu()
        three = self.relu6(self.norm_three(self.three(torch.cat([one, two], 1))))
        return self.head(three.mean((2, 3))) + self.last(three.tanh()).mean((2, 3))


def net() -> Net:
    made = Net().eval()
    for norm in (made.norm_one, made.norm_two):
        norm.weight.data.normal_()
        norm.bias.data.normal_()
    return made


def test_sums_add_concatenations_concatenate_and_what_is_not_known_is_left_out():
    model = net()
    seen = flow(model, torch.randn(2, 3, 5, 5))
    known = moments(model, seen)

    def before(path: str) -> Moments | None:
        return known.get(seen.received[path][0][0])

    image, one, two, three, head = map(before, ("one", "two", "norm_two", "three", "head"))
    assert image.mean.tolist() == [0.0] * 3
    assert two is None  # a convolution's result, before its norm
    beta, gamma = (tensor.detach().double() for tensor in (model.norm_one.bias, model.norm_one.weight))
    expected = rectified(Moments(beta, gamma.square()))
    torch.testing.assert_close(one, expected)
    own, gain = (tensor.detach().double() for tensor in (model.norm_two.bias, model.norm_two.weight))
    summed = rectified(Moments(own + expected.mean, gain.square() + expected.variance))
    torch.testing.assert_close(three.mean, torch.cat([expected.mean, summed.mean]))
    normal = Moments(torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(head, rectified(normal, below=6.0))
    assert before("last") is None


def test_a_folded_norm_still_knows():
    model, x = net(), torch.randn(2, 3, 5, 5)
    before = moments(model, flow(model, x))
    model = fold_norm(model, "one", "norm_one")
    after = moments(model, flow(model, x))
    assert before.keys() == after.keys()
    for number, found in before.items():
        torch.testing.assert_close(found, after[number])
