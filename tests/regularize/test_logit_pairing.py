"""Adversarial logit pairing: the card's number, both gradients, and whom it suits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.attacks import L2, Linf, pixels
from galago.augment.cutmix import CutMix
from galago.batch import Batch, Step
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, close, exported, tiny_network
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.regularize.logit_pairing import LogitPairing, distance
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish
from noise import normalized_batch, trained_network

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "reg_robustness_eval.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


class Says(nn.Module):
    """Gives attacked scores to the first images it is shown in training mode, and clean ones to the next."""

    def __init__(self, *answers: Tensor) -> None:
        super().__init__()
        self.answers = list(answers)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x.flatten(1)[:, : self.answers[0].shape[1]]
        self.shown.append(x)
        return self.answers[len(self.shown) - 1]


def prepared(method: LogitPairing) -> LogitPairing:
    method.prepare(nn.Identity(), TinyImages())
    return method


def paired(clean: Tensor, adversarial: Tensor, target: Tensor, eta: float = 0.5) -> Step:
    batch = Batch(TinyImages().normalize(torch.rand(len(target), 3, 8, 8)), target)
    model = Says(adversarial, clean).train()
    return prepared(LogitPairing(eta, steps=1)).step(batch, Forward(model, Classify(5)))


def test_the_loss_is_the_cards() -> None:
    target = nn.functional.one_hot(golden("labels").long(), 5).double()
    step = paired(golden("logits"), golden("alp_adv_logits"), target)
    assert step.losses.keys() == {"cross_entropy", "logit_pairing"}
    assert sum(step.losses.values()).item() == pytest.approx(float(GOLDEN["alp_loss_eta0_5"]), rel=1e-9)


def test_both_halves_get_a_gradient() -> None:
    clean, adversarial = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    target = torch.eye(5)[:4]
    loss = paired(clean, adversarial, target, 2.0).loss
    first, second = torch.autograd.grad(loss, [clean, adversarial])
    pull = 2.0 * 2 * (clean - adversarial) / 20
    torch.testing.assert_close(first, ((clean.softmax(1) - target) / 8 + pull).detach())
    torch.testing.assert_close(second, ((adversarial.softmax(1) - target) / 8 - pull).detach())


def test_the_distance_is_a_mean_over_images_and_classes() -> None:
    one, other = torch.randn(2, 6, 3)
    wanted = sum((one[b, k] - other[b, k]) ** 2 for b in range(6) for k in range(3)) / 18
    torch.testing.assert_close(distance(one, other), wanted)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.7)])
def test_the_first_pass_sees_an_attack_within_the_ball_and_the_last_the_images_themselves(ball: Linf | L2) -> None:
    batch, normalize = normalized_batch(), TinyImages().normalize
    model = Says(torch.zeros(8, 3), torch.zeros(8, 3)).train()
    step = prepared(LogitPairing(ball=ball, steps=2)).step(batch, Forward(model, classify()))
    attacked, clean = model.shown
    assert clean is batch.input
    assert step.batch is batch
    change = pixels(attacked, normalize) - pixels(clean, normalize)
    size = change.square().sum((1, 2, 3)).sqrt() if isinstance(ball, L2) else change.abs()
    assert 0 < size.max() <= ball.epsilon + 1e-5


@torch.no_grad()
def apart(pairing: float) -> float:
    """How far clean and attacked scores are apart after a short training."""
    with torch.enable_grad():
        trial = Trial(
            tiny_network, classify(), TinyImages(), lambda: [LogitPairing(pairing, Linf(0.12), step_size=0.04, steps=3)]
        )
        for number in range(24):
            trial.step(number % 6)
    network, batch = trial.learner.model.eval(), normalized_batch()
    return float(distance(network(batch.input), network(trial.learner.ideas[0].attacked(network, batch))))


def test_it_pulls_scores_together_the_more_the_larger_its_weight() -> None:
    assert apart(0.0) > 1.2 * apart(0.5) > 1.4 * apart(5.0)


def test_it_obeys_the_laws() -> None:
    check_method(lambda: LogitPairing(steps=2))
    check_method(lambda: LogitPairing(0.1, L2(0.5), step_size=0.1, steps=1))


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


@pytest.mark.parametrize(
    "first", [lambda: [CutMix()], lambda: [quantize()], lambda: [Distill(tiny_network(), [SoftTargets()])]]
)
def test_it_trains_finishes_and_exports_behind_others(first) -> None:
    def methods() -> list[Method]:
        return [*first(), LogitPairing(steps=1)]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        assert trial.step(number).loss.isfinite()
    finished = finish(trial.learner)
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_losses_of_methods_behind_it_are_halved_and_added_up() -> None:
    def methods() -> list[Method]:
        return [LogitPairing(steps=1), Distill(tiny_network(), [SoftTargets()])]

    losses = Trial(tiny_network, classify(), TinyImages(), methods).step(0).losses
    assert losses.keys() == {"cross_entropy", "soft_targets", "logit_pairing"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"pairing": -1.0}, "pairing is -1"), ({"steps": 0}, "0 steps"), ({"step_size": 0.0}, "7 steps of 0.0")],
)
def test_numbers_that_mean_nothing_are_refused(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        LogitPairing(**arguments)


def test_labels_that_are_no_probabilities_are_refused() -> None:
    batch = normalized_batch()._replace(target=torch.arange(8) % 3)
    with pytest.raises(UserError, match="LogitPairing needs class probabilities"):
        prepared(LogitPairing()).step(batch, Forward(trained_network(), classify()))
