"""Rebuilding images from features: the golden loss, the decoder's shapes, and that nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.data import Normalize
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, identical, tiny_network
from galago.method import Forward, Method
from galago.models.small import SmallCNN
from galago.quantize.ewgs import EWGS
from galago.quantize.lsq import LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.reconstruct import Reconstruct, decoder, last_map, mirrored
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "small_data.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def small() -> nn.Module:
    return SmallCNN(3, 3, 8, width=4, depth=2, dropout=0.0)


def trial(*methods: Method) -> Trial:
    return Trial(small, classify(), TinyImages(), lambda: list(methods))


class Told(nn.Module):
    """Gives what a test wants, whatever it is given."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer


def test_the_loss_is_the_golden_one() -> None:
    method = Reconstruct(float(GOLDEN["unsupervised_weight"]), layer="0")
    net = nn.Sequential(nn.Identity(), Told(golden("logits")))
    data = TinyImages()
    data.normalize = Normalize([0.0] * 3, [1.0] * 3)
    method.prepare(net, data)
    method.decoder = nn.Sequential(Told(golden("reconstruction")))
    target = torch.eye(5, dtype=torch.float64)[golden("labels")]
    step = method.step(Batch(golden("x"), target), Forward(net, Classify(5)))
    torch.testing.assert_close(sum(step.losses.values()), golden("loss"), rtol=1e-9, atol=1e-12)
    wrong = (golden("reconstruction") - golden("x")).square().mean()
    torch.testing.assert_close(step.losses["reconstruction"], 0.5 * wrong)


def test_the_decoder_goes_back_through_the_sizes_of_the_network() -> None:
    assert mirrored(32, 4) == [8, 16, 32]
    assert mirrored(28, 3) == [7, 14, 28]
    assert mirrored(8, 8) == [8]
    for feature, image in (
        ((2, 16, 4, 4), (2, 3, 32, 32)),
        ((2, 8, 3, 6), (2, 1, 28, 24)),
        ((2, 4, 9, 9), (2, 3, 9, 9)),
    ):
        made = decoder(torch.Size(feature), torch.Size(image))
        assert made(torch.zeros(feature)).shape == image
    layers = [type(layer).__name__ for layer in decoder(torch.Size([1, 16, 8, 8]), torch.Size([1, 3, 32, 32]))]
    assert layers == ["Upsample", "Conv2d", "ReLU", "Upsample", "Conv2d"]


def test_the_last_feature_map_is_found_before_pooling() -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert last_map(small().eval(), image) == "features"
    assert last_map(tiny_network().eval(), image) == "down"
    with pytest.raises(UserError, match="no feature map"):
        last_map(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), image)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_without_weight_training_is_bit_for_bit_that_without_it_and_nothing_is_drawn(weight: float) -> None:
    states = []
    for methods in ([Reconstruct(weight)], []):
        started = trial(*methods)
        for number in range(3):
            started.step(number)
        states.append((clone(started.learner.model.state_dict()), torch.get_rng_state()))
    assert identical(states[0][1], states[1][1])
    assert identical(states[0][0], states[1][0]) == (weight == 0)


def test_rebuilding_gets_better_with_training() -> None:
    started = trial(Reconstruct(1.0))
    losses = [started.step(number % 6).losses["reconstruction"].item() for number in range(90)]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])


def test_the_network_sees_noise_and_the_decoder_has_to_rebuild_what_was_clean() -> None:
    started = trial(Reconstruct(1.0, noise=0.1))
    batch = started.batches[0]
    batch = batch._replace(input=started.data.normalize(batch.input))
    method = started.learner.ideas[0]
    step = method.step(batch, Forward(started.learner.model, classify()))
    assert (step.batch.input - batch.input).std().item() == pytest.approx(0.1, rel=0.1)
    assert isinstance(method, Reconstruct)
    expected = (method.decoder(method.feature()) - batch.input).square().mean()
    torch.testing.assert_close(step.losses["reconstruction"], expected)


def test_the_finished_network_is_the_one_without_a_decoder() -> None:
    started = trial(Reconstruct())
    started.step(0)
    network, image = started.learner.model.eval(), started.image()
    before = network(image)
    after = finish(started.learner)
    assert torch.equal(after(image), before)
    assert after.state_dict().keys() == small().state_dict().keys()
    assert not any(module._forward_hooks for module in after.modules())
    torch.testing.assert_close(exported(after, image), before)


@pytest.mark.parametrize("other", [CutMix(probability=1.0), Quantize(LSQWeight(4), EWGS(4))], ids=str)
def test_it_trains_with_mixing_and_with_quantizers_and_exports(other: Method) -> None:
    started = trial(other, Reconstruct())
    for number in range(2):
        assert started.step(number).loss.isfinite()
    assert exported(finish(started.learner), started.image()).isfinite().all()


def test_layers_that_give_no_map_and_impossible_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="'flatten' gives 1×32; name one"):
        trial(Reconstruct(layer="flatten"))
    with pytest.raises(UserError, match="has no layer 'feature'"):
        trial(Reconstruct(layer="feature"))
    with pytest.raises(UserError, match="weight is -1"):
        Reconstruct(-1.0)


def test_it_tells_what_it_adds() -> None:
    assert "goes in the end" in str(trial(Reconstruct()).learner.ideas[0].summary())
    assert Reconstruct(0.0).summary() is None


def test_a_network_in_branches_rebuilds_from_its_first() -> None:
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(192, 3))
    method, image = Reconstruct(layer="0"), torch.randn(4, 3, 8, 8)
    method.prepare(net, TinyImages())
    before = method.step(Batch(image, torch.eye(3)[[0] * 4]), Forward(net, classify())).losses["reconstruction"]
    net[0].register_forward_pre_hook(lambda module, given: torch.cat([given[0], torch.randn(4, 3, 8, 8)]))
    net[1].register_forward_hook(lambda module, given, output: output[:4])
    after = method.step(Batch(image, torch.eye(3)[[0] * 4]), Forward(net, classify())).losses["reconstruction"]
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_it_obeys_the_laws(noise: float) -> None:
    check_method(lambda: Reconstruct(noise=noise))
