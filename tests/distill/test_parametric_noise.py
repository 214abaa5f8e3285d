"""Noise of learned strength on weights: the official code's numbers, what it has to be, and what ships."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.distill.parametric_noise import NoisyWeight, ParametricNoise, draw
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, identical, tiny_network
from galago.quantize.layer import QuantLayer
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.testing import check_method
from galago.trainer import finish
from noise import golden, normalized_batch, trained_network

FORMS = {"layerwise": (1, 1, 1, 1), "channelwise": (5, 1, 1, 1), "elementwise": (5, 3, 3, 3)}


def convolution() -> nn.Conv2d:
    made = nn.Conv2d(3, 5, 3, padding=1).double()
    with torch.no_grad():
        made.weight.copy_(golden("pni_weight"))
        made.bias.copy_(golden("pni_bias"))
    return made


def noisy(shape: tuple[int, ...]) -> NoisyWeight:
    return NoisyWeight(convolution(), torch.Size(shape)).double()


def output(part: NoisyWeight, eta: Tensor) -> Tensor:
    x = golden("pni_x")
    return part.layer(x) + part.noise(x, eta)


@pytest.mark.parametrize(("form", "shape"), FORMS.items())
def test_output_and_gradients_are_those_of_the_official_code(form: str, shape: tuple[int, ...]) -> None:
    part = noisy(shape)
    assert (part.alpha == golden("pni_alpha_init")).all()
    found = output(part, golden(f"pni_{form}_noise"))
    torch.testing.assert_close(found, golden(f"pni_{form}_out"), rtol=1e-6, atol=1e-6)
    found.backward(golden("pni_grad_out"))
    torch.testing.assert_close(part.layer.weight.grad, golden(f"pni_{form}_grad_weight"), rtol=1e-6, atol=1e-6)
    wanted = golden(f"pni_{form}_grad_alpha").view_as(part.alpha)
    torch.testing.assert_close(part.alpha.grad, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", FORMS.values())
def test_it_is_the_layer_with_a_noisy_weight_in_its_place(shape: tuple[int, ...]) -> None:
    part, eta = noisy(shape), torch.randn(5, 3, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        part.alpha.uniform_(-1, 1)
        other = convolution()
        for place in torch.cartesian_prod(*map(torch.arange, eta.shape)):
            at = tuple(place.tolist())
            shared = tuple(min(index, size - 1) for index, size in zip(at, shape, strict=True))
            other.weight[at] += part.alpha[shared] * eta[at]
        torch.testing.assert_close(output(part, eta), other(golden("pni_x")))


def test_noise_is_as_large_as_the_whole_weights_spread() -> None:
    weight = golden("pni_weight").requires_grad_()
    draws = torch.stack([draw(weight) for _ in range(4000)])
    assert not draws.requires_grad
    error = draws.numel() ** -0.5
    assert abs(draws.mean()) < 4 * error * golden("pni_std")
    assert abs(draws.std() / golden("pni_std") - 1) < 4 * error


def test_noise_is_drawn_anew_in_training_and_evaluation_and_repeats_with_its_seed() -> None:
    network, image = ParametricNoise().prepare(tiny_network(), TinyImages()), normalized_batch().input
    for mode in (True, False):
        network.train(mode)
        assert not torch.equal(network(image), network(image))
        found = []
        for _ in range(2):
            torch.manual_seed(5)
            found.append(network(image))
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, {(1, 1, 1, 1), (1, 1)}),
        ({"per_channel": True}, {(5, 1, 1, 1), (10, 1, 1, 1), (3, 1)}),
        ({"per_weight": True}, {(5, 3, 3, 3), (5, 5, 3, 3), (10, 5, 3, 3), (3, 10)}),
    ],
)
def test_every_convolution_and_linear_layer_learns_its_own_strength(
    options: dict[str, bool], shapes: set[tuple[int, ...]]
) -> None:
    network = ParametricNoise(**options).prepare(tiny_network(), TinyImages())
    found = [part for part in network.modules() if isinstance(part, NoisyWeight)]
    assert len(found) == 5
    assert {tuple(part.alpha.shape) for part in found} == shapes
    assert all(isinstance(part.layer, nn.Conv2d | nn.Linear) for part in found)


def test_strength_does_not_decay() -> None:
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [ParametricNoise()])
    alphas = {id(part.alpha) for part in trial.learner.model.modules() if isinstance(part, NoisyWeight)}
    decays = {group["weight_decay"] for group in trial.optimizer.param_groups if id(group["params"][0]) in alphas}
    assert decays == {0.0}


def test_layers_that_compute_another_weight_are_left_alone() -> None:
    network: nn.Module = nn.Sequential(Standardized(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    network = ParametricNoise().prepare(network, TinyImages())
    assert isinstance(network[0], Standardized)
    assert isinstance(network[2], NoisyWeight)


class Standardized(nn.Conv2d):
    """A convolution that computes with its weight divided by its spread."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def test_behind_quantize_the_noise_goes_around_the_quantized_layer() -> None:
    methods = [Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)), ParametricNoise(per_channel=True)]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    found = [part for part in trial.learner.model.modules() if isinstance(part, NoisyWeight)]
    assert len(found) == 5
    assert all(isinstance(part.layer, QuantLayer) for part in found)
    before = clone([part.alpha for part in found])
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    assert not identical(before, [part.alpha.detach() for part in found])
    network = finish(trial.learner)
    assert any(isinstance(part, QuantLayer) for part in network.modules())
    torch.testing.assert_close(exported(network, trial.image()), network(trial.image()))


def test_when_training_ends_the_noise_is_gone() -> None:
    network, method = trained_network(), ParametricNoise()
    image = normalized_batch().input
    wanted = network(image)
    network = method.finish(method.prepare(network, TinyImages()))
    assert not any(isinstance(part, NoisyWeight) for part in network.modules())
    assert torch.equal(network(image), wanted)


@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"per_weight": True}])
def test_it_obeys_the_laws(options: dict[str, bool]) -> None:
    check_method(lambda: ParametricNoise(**options), same_answer=False)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="exclude each other"):
        ParametricNoise(per_channel=True, per_weight=True)
    with pytest.raises(UserError, match="finds no convolution or linear layer"):
        ParametricNoise().prepare(nn.Sequential(nn.ReLU()), TinyImages())
