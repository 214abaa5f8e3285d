"""Energy margins: the loss by hand, whom it pushes where, what it leaves alone, and beside other methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, identical, tiny_network
from galago.layers import find
from galago.method import Forward, Method
from galago.outside import OtherData
from galago.outside_made_up import Blobs, Permuted, Uniform
from galago.probe import Deployed
from galago.probes.out_of_distribution import Energy, OutOfDistribution
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.energy_margin import EnergyMargin, energies, first, margin_loss
from galago.tasks.abstain import ClassifyOrAbstain
from galago.testing import check_method
from galago.trainer import finish
from noise import normalized_batch
from outsiders import Pictures, golden, noise, two_sets

DATA = TinyImages()


def prepared(**arguments: Any) -> EnergyMargin:
    method = EnergyMargin(**{"outside": two_sets()} | arguments)
    method.prepare(nn.Identity(), DATA)
    return method


def test_the_energy_is_the_golden_score_with_its_sign_changed() -> None:
    torch.testing.assert_close(-energies(golden("logits")), golden("score_energy_T1"), rtol=0, atol=1e-9)


def test_the_loss_agrees_with_a_loop() -> None:
    inside, outside = -30 * torch.rand(9), -30 * torch.rand(7)
    wanted = sum(max(0.0, e + 23) ** 2 for e in inside.tolist()) / 9
    wanted += sum(max(0.0, -5 - e) ** 2 for e in outside.tolist()) / 7
    assert margin_loss(inside, outside, -23, -5).item() == pytest.approx(wanted, rel=1e-5)


def test_energies_beyond_their_margins_cost_nothing_and_are_left_alone() -> None:
    inside, outside = torch.tensor([-23.0, -40.0], requires_grad=True), torch.tensor([-5.0, 3.0], requires_grad=True)
    loss = margin_loss(inside, outside, -23, -5)
    assert loss.item() == 0
    gradients = torch.autograd.grad(loss, [inside, outside])
    assert all(not gradient.any() for gradient in gradients)


def test_a_step_adds_the_weighted_loss_of_the_batch_and_of_as_many_images_from_outside() -> None:
    shown: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shown.append(x)
            return 3 * x.mean((2, 3))

    batch = normalized_batch()
    step = prepared(weight=0.5).step(batch, Forward(Watching(), classify()))
    assert torch.equal(shown[0], batch.input)
    assert shown[1].shape == batch.input.shape
    wanted = margin_loss(*(energies(3 * x.mean((2, 3))) for x in shown), -23, -5)
    torch.testing.assert_close(step.losses["energy_margin"], 0.5 * wanted)
    kinds = torch.cat([first(one.training(DATA), 20) for one in two_sets()])
    assert all((DATA.normalize(kinds) == image).flatten(1).all(1).any() for image in shown[1])


def test_sets_are_drawn_from_alike_however_large_they_are() -> None:
    method = prepared(outside=[Uniform(images=2), OtherData("black", Pictures(torch.zeros(90, 3, 8, 8).byte()))])
    black = [not method.draw().any() for _ in range(400)]
    assert sum(black) / 400 == pytest.approx(0.5, abs=0.1)


def test_no_more_images_of_a_set_are_kept_than_asked_for() -> None:
    assert [len(images) for images in prepared(images=13)._sets] == [13, 13]
    assert [len(images) for images in prepared(outside=[Permuted()])._sets] == [48]


def test_images_that_train_are_not_those_that_measure() -> None:
    for one in two_sets():
        trained, measured = first(one.training(DATA), 99), first(one.test(DATA), 99)
        assert not any(torch.equal(image, other) for image in trained for other in measured)


def test_statistics_of_batch_norm_and_modes_are_as_without_it() -> None:
    batch, networks = normalized_batch(), []
    for methods in ([], [prepared()]):
        torch.manual_seed(0)
        network = tiny_network().train()
        find(network, "stem").eval()
        Forward(network, classify(), methods)(batch)
        networks.append(network)
    assert identical(clone(dict(networks[0].named_buffers())), clone(dict(networks[1].named_buffers())))
    assert {path for path, part in networks[1].named_modules() if not part.training} == {
        path for path, part in networks[0].named_modules() if not part.training
    }


def test_a_network_learns_to_tell_the_sets_that_it_is_taught() -> None:
    sets = [Blobs(images=100)]
    found, others = [], []
    for weight in (0.0, 0.1):
        made = EnergyMargin(weight, -5.0, -1.0, sets)
        trial = Trial(tiny_network, classify(), DATA, lambda made=made: [made])  # type: ignore[misc]
        for number in range(60):
            trial.step(number % len(trial.batches))
        network = trial.learner.model.eval()
        deployed = Deployed(network, DATA.normalize, classify())
        found.append(OutOfDistribution(sets, [Energy()])(deployed, classify(), DATA)["auroc_energy_mean"])
        with torch.no_grad():
            others.append(float(energies(torch.cat([deployed(batch.input) for batch in sets[0].test(DATA)])).mean()))
    assert found[1] > 0.99
    assert others[0] < -1.5
    assert others[1] == pytest.approx(-1, abs=0.35)


def test_dicts_of_outputs_and_tasks_that_abstain_count_by_their_classes() -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"main": x.mean((2, 3)), "auxiliary": 99 * x.mean((2, 3))}

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    losses = []
    for network in (Several(), One()):
        torch.manual_seed(0)
        losses.append(prepared().step(normalized_batch(), Forward(network, classify())).losses["energy_margin"])
    assert torch.equal(*losses)
    batch = normalized_batch()
    batch = batch._replace(target=batch.target[:, :2])
    torch.manual_seed(0)
    held = prepared().step(batch, Forward(One(), ClassifyOrAbstain(2, 1.5))).losses["energy_margin"]
    assert held != losses[1]


def test_taps_of_other_methods_keep_what_the_batch_gave() -> None:
    def losses(*methods: Method) -> dict[str, Tensor]:
        return Trial(tiny_network, classify(), DATA, lambda: list(methods)).step(0).losses

    def distill() -> Distill:
        torch.manual_seed(7)
        return Distill(tiny_network(), [Attention(1.0, layers=[-1])])

    alone = losses(distill())["attention"]
    for methods in ([EnergyMargin(outside=two_sets()), distill()], [distill(), EnergyMargin(outside=two_sets())]):
        assert torch.equal(losses(*methods)["attention"], alone)


@pytest.mark.parametrize("other", [CutMix, lambda: Quantize(LSQWeight(4), LSQ(4))])
def test_with_mixing_and_quantization_it_trains_finishes_and_exports(other: Any) -> None:
    trial = Trial(tiny_network, classify(), DATA, lambda: [other(), EnergyMargin(outside=two_sets())])
    for number in range(2):
        step = trial.step(number)
        assert step.loss.isfinite()
        assert step.losses.keys() >= {"cross_entropy", "energy_margin"}
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def test_it_obeys_the_laws() -> None:
    check_method(lambda: EnergyMargin(outside=two_sets()))
    check_method(lambda: EnergyMargin(outside=[Permuted(), OtherData("own", TinyImages())]))


def test_a_set_without_training_images_is_refused_by_name() -> None:
    class NoTraining(Pictures):
        def plain(self) -> list[Batch]:
            return []

    with pytest.raises(UserError, match="birds holds no images"):
        prepared(outside=[OtherData("birds", NoTraining(noise(5, 3, 8, 8)))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": -0.1}, "weight is -0.1"),
        ({"inside_margin": -5.0}, "inside_margin -5 must lie below outside_margin -5"),
        ({"outside": []}, "outside is empty"),
        ({"images": 0}, "images is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"EnergyMargin: {message}"):
        EnergyMargin(**wrong)
