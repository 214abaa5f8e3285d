"""Adversarial training: what the network is shown, what the loss is, and whom it suits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.attacks import L2, Linf, against, length, pixels
from galago.augment.adversarial_view import AdversarialView
from galago.batch import Batch, Step
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.distill.noise_injection import NoiseInjection
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, identical, tiny_network
from galago.method import Forward
from galago.testing import check_method
from noise import normalized_batch, trained_network


class Watched(nn.Module):
    """A network that keeps what it was shown in training mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.shown = network, []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shown.append(x.detach())
        scores: Tensor = self.network(x)
        return scores


def prepared(method: AdversarialView) -> AdversarialView:
    method.prepare(nn.Identity(), TinyImages())
    return method


def step(method: AdversarialView, model: nn.Module, batch: Batch, progress: float = 0.5) -> Step:
    return prepared(method).step(batch, Forward(model, classify(), (), progress))


def test_pixels_are_those_that_were_normalized() -> None:
    data = TinyImages()
    raw = data.train()[0].input
    torch.testing.assert_close(pixels(data.normalize(raw), data.normalize), raw / 255)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.7)])
def test_the_network_is_shown_images_that_fool_it_within_the_ball(ball: Linf | L2) -> None:
    data, batch, model = TinyImages(), normalized_batch(), Watched(trained_network()).train()
    before = clone(dict(model.named_buffers()))
    shown = prepared(AdversarialView(ball)).attacked(model, batch)
    assert model.training
    assert not model.shown, "attacks are made in evaluation mode"
    assert identical(before, dict(model.named_buffers()))
    image, found = pixels(batch.input, data.normalize), pixels(shown, data.normalize)
    change = found - image
    assert (length(change).max() if isinstance(ball, L2) else change.abs().max()) <= ball.epsilon + 1e-5
    loss = against(lambda x: model.eval()(data.normalize(x)), batch.target)
    assert (loss(found) > loss(image)).all()


def test_the_loss_is_that_of_attacked_images_and_the_batch_stays_the_clean_one() -> None:
    model, batch = Watched(trained_network()).train(), normalized_batch()
    found = step(AdversarialView(), model, batch)
    assert found.batch is batch
    (shown,) = model.shown
    assert not torch.equal(shown, batch.input)
    wanted = nn.functional.cross_entropy(found.output, batch.target)
    assert torch.equal(found.losses["cross_entropy"], wanted)


def test_clean_images_keep_their_share_of_the_loss() -> None:
    model, batch = Watched(trained_network()).eval(), normalized_batch()
    losses = []
    for share in (0.0, 0.25):
        torch.manual_seed(3)
        losses.append(step(AdversarialView(clean_weight=share), model, batch).losses["cross_entropy"])
    clean = nn.functional.cross_entropy(model(batch.input), batch.target)
    torch.testing.assert_close(losses[1], 0.25 * clean + 0.75 * losses[0])


def test_an_attack_on_its_own_answers_does_not_know_the_labels() -> None:
    model, batch = trained_network(), normalized_batch()
    wrong = batch._replace(target=batch.target.roll(1, 1))
    views = []
    for given in (batch, wrong):
        torch.manual_seed(3)
        views.append(prepared(AdversarialView(own_labels=True)).attacked(model, given))
    assert torch.equal(*views)
    torch.manual_seed(3)
    assert not torch.equal(views[0], prepared(AdversarialView()).attacked(model, wrong))


def test_before_it_starts_training_is_as_without_it() -> None:
    model, batch = Watched(trained_network()).train(), normalized_batch()
    random = torch.get_rng_state()
    step(AdversarialView(start=0.3), model, batch, progress=0.29)
    assert torch.equal(random, torch.get_rng_state())
    step(AdversarialView(start=0.3), model, batch, progress=0.3)
    assert torch.equal(model.shown[0], batch.input)
    assert not torch.equal(model.shown[1], batch.input)


class Teacher(nn.Module):
    """Keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.seen = tiny_network(), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        scores: Tensor = self.network(x)
        return scores


def test_behind_a_teacher_it_leaves_the_teacher_clean_images_and_in_front_attacked_ones() -> None:
    batch = normalized_batch()
    for behind in (True, False):
        teacher, model, view = Teacher(), Watched(trained_network()).train(), prepared(AdversarialView())
        distill = Distill(teacher, [SoftTargets()])
        first, second = (distill, view) if behind else (view, distill)
        first.step(batch, Forward(model, classify(), [second], 0.5))
        assert torch.equal(teacher.seen[0], batch.input) == behind
        assert not torch.equal(model.shown[0], batch.input)


def test_it_makes_a_network_harder_to_fool() -> None:
    def fooled(network: nn.Module) -> float:
        view, batch = prepared(AdversarialView(Linf(0.12), steps=10)), normalized_batch()
        network.eval()
        return float((network(view.attacked(network, batch)).argmax(1) != batch.target.argmax(1)).float().mean())

    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [AdversarialView(Linf(0.12), steps=3)])
    for number in range(48):
        trial.step(number % 6)
    assert fooled(trial.learner.model) <= fooled(trained_network(48)) - 0.2


def test_it_trains_a_noisy_network_and_resumes_bit_for_bit() -> None:
    check_method(lambda: AdversarialView(steps=2, clean_weight=0.5, own_labels=True))
    check_method(lambda: AdversarialView(L2(0.5), step_size=0.1, steps=1))
    methods = [NoiseInjection(0.3), Distill(tiny_network(), [SoftTargets()]), AdversarialView(steps=2)]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods)
    assert trial.step(0).losses.keys() == {"cross_entropy", "soft_targets"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"steps": 0}, "0 steps of None attack nothing"),
        ({"step_size": 0.0}, "7 steps of 0.0 attack nothing"),
        ({"clean_weight": 1.0}, "clean_weight is 1"),
        ({"start": -0.1}, "start is -0.1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        AdversarialView(**arguments)


def test_labels_that_are_no_probabilities_are_refused() -> None:
    batch = normalized_batch()._replace(target=torch.arange(8) % 3)
    with pytest.raises(UserError, match="AdversarialView needs class probabilities"):
        step(AdversarialView(), trained_network(), batch)
