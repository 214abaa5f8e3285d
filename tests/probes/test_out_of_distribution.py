"""Scores from outputs against golden values; the probe on models, files, tasks that abstain, and wrong outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago import recipe
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.outside import OtherData
from galago.outside_made_up import Uniform
from galago.probe import TEST, Deployed, Outputs, ViewsProbe
from galago.probes.detection import auroc
from galago.probes.out_of_distribution import (
    Energy,
    MaximumLogit,
    MaximumSoftmax,
    NegativeEntropy,
    OutOfDistribution,
    Reservation,
    Score,
    energy,
    maximum_softmax,
    negative_entropy,
)
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.spec import build, describe
from galago.task import Task
from galago.tasks.abstain import ClassifyOrAbstain
from galago.tasks.classify import Classify
from galago.testing import check_probe
from noise import trained_network
from outsiders import Pictures, golden, noise, two_sets

DATA = TinyImages()
ALL: list[Score] = [MaximumSoftmax(), MaximumLogit(), Energy(), Energy(2.0), NegativeEntropy()]


def stored(inside: Tensor, outside: Tensor) -> dict[str, Outputs]:
    """Outputs of the test set and of the set that `Uniform` makes."""
    views = {TEST: inside, Uniform().view: outside}
    return {name: Outputs(scores, torch.zeros(len(scores), 5)) for name, scores in views.items()}


@pytest.mark.parametrize(
    ("score", "name"), list(zip(ALL, ["msp", "max_logit", "energy_T1", "energy_T2", "neg_entropy"], strict=True))
)
def test_scores_are_the_golden_ones(score: Score, name: str) -> None:
    torch.testing.assert_close(score(golden("logits"), Classify(5)), golden(f"score_{name}"), rtol=0, atol=1e-9)


def test_two_rows_of_class_scores_give_the_values_of_the_card() -> None:
    z = torch.tensor([[2, 1, 0], [0, 1, 3]], dtype=torch.float64)
    assert energy(z).tolist() == pytest.approx([2.407605964, 3.169846020], abs=1e-9)
    assert maximum_softmax(z).tolist() == pytest.approx([0.665240956, 0.843794734], abs=1e-9)
    assert -float(negative_entropy(z).mean()) == pytest.approx(0.678331099, abs=1e-9)


def test_energy_lies_above_the_largest_score_and_tends_to_it_as_it_cools() -> None:
    z = golden("logits")
    largest = z.max(1).values
    gaps = [float((energy(z, t) - largest).max()) for t in (2.0, 1.0, 0.1, 0.001)]
    assert gaps == sorted(gaps, reverse=True)
    assert all(0 <= gap <= t * np.log(5) for gap, t in zip(gaps, (2.0, 1.0, 0.1, 0.001), strict=True))


def test_large_scores_do_not_overflow() -> None:
    z = 1e4 * golden("logits")
    assert all(score(z, Classify(5)).isfinite().all() for score in ALL)


def test_numbers_are_those_of_each_score_between_the_two_views() -> None:
    inside, outside = golden("logits"), 0.3 * golden("logits")
    found = OutOfDistribution([Uniform()], ALL).score(stored(inside, outside), Classify(5))
    for score in ALL:
        wanted = auroc(score(inside, Classify(5)), score(outside, Classify(5)))
        assert found[f"auroc_{score.name}_uniform"] == found[f"auroc_{score.name}_mean"] == wanted
    assert len(found) == len(ALL) * (2 + 6)
    assert "auroc_energy_2_uniform" in found


def test_views_are_the_test_set_and_each_set_by_its_whole_name() -> None:
    views = OutOfDistribution([Uniform(images=5), OtherData("svhn", DATA)]).views(DATA)
    assert list(views) == [TEST, "ood/uniform/5/0", "ood/svhn"]
    assert isinstance(OutOfDistribution(), ViewsProbe)
    assert len(OutOfDistribution().views(DATA)) == 6


def test_a_trained_network_is_surer_of_its_own_images_than_of_noise_and_not_of_its_own_halves() -> None:
    own = torch.cat([batch.input for batch in DATA.test()])
    halves = Pictures(own[::2]), OtherData("other_half", Pictures(own[1::2]))
    deployed = Deployed(trained_network(60), DATA.normalize, classify())
    same = OutOfDistribution([halves[1]])(deployed, classify(), halves[0])
    assert same["auroc_msp_other_half"] == pytest.approx(0.5, abs=0.2)
    found = OutOfDistribution([Uniform(images=200)])(deployed, classify(), DATA)
    assert found["auroc_msp_uniform"] > 0.7


def test_a_network_that_always_says_the_same_tells_nothing_apart() -> None:
    found = OutOfDistribution([Uniform()], ALL).score(stored(torch.ones(10, 5), torch.ones(4, 5)), Classify(5))
    assert {name: value for name, value in found.items() if name.startswith("auroc")} == dict.fromkeys(
        (f"auroc_{score.name}_{where}" for score in ALL for where in ("uniform", "mean")), 0.5
    )
    assert found["fpr95_msp_mean"] == 1
    assert found["detection_error_energy_mean"] == 0.5


def test_a_task_that_abstains_is_scored_by_its_classes_and_by_what_it_holds_back() -> None:
    task = ClassifyOrAbstain(5, 3.0)
    z = torch.cat([golden("logits"), torch.linspace(0, 9, 8).double()[:, None]], 1)
    torch.testing.assert_close(MaximumSoftmax()(z, task), golden("score_msp"), rtol=0, atol=1e-9)
    torch.testing.assert_close(Energy()(z, task), golden("score_energy_T1"), rtol=0, atol=1e-9)
    torch.testing.assert_close(Reservation()(z, task), 1 - z.softmax(1)[:, -1])
    holding = torch.cat([z[:, :5], torch.full((8, 1), 99.0)], 1)
    found = OutOfDistribution([Uniform()], [Reservation()]).score(stored(z, holding), task)
    assert found["auroc_reservation_uniform"] == 1


def test_a_task_that_always_answers_has_no_reservation_to_score_by() -> None:
    with pytest.raises(UserError, match="Reservation: Classify always answers"):
        Reservation()(golden("logits"), Classify(5))


@pytest.mark.parametrize("score", ALL, ids=lambda score: score.name)
def test_outputs_that_are_no_numbers_are_refused_by_the_name_of_their_set(score: Score) -> None:
    wrong = golden("logits").index_fill(0, torch.tensor([2, 5]), float("nan"))
    with pytest.raises(UserError, match="answers to 2 of 8 images of uniform are no finite numbers"):
        OutOfDistribution([Uniform()], [score]).score(stored(golden("logits"), wrong), Classify(5))
    with pytest.raises(UserError, match="answers to 2 of 8 images of the test set are no finite numbers"):
        OutOfDistribution([Uniform()], [score]).score(stored(wrong, golden("logits")), Classify(5))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 7), (3, 64, 64)])
def test_another_data_set_of_any_size_can_be_outside(shape: tuple[int, int, int]) -> None:
    probe = OutOfDistribution([OtherData("other", Pictures(noise(12, *shape), classes=9))])
    found = probe(Deployed(tiny_network(), DATA.normalize, classify()), classify(), DATA)
    assert 0 <= found["auroc_msp_other"] <= 1


def test_a_set_without_images_is_refused_before_anything_is_run() -> None:
    class Refusing(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            raise AssertionError("a network was run")

    probe = OutOfDistribution([OtherData("birds", Pictures(noise(0, 3, 8, 8)))])
    with pytest.raises(UserError, match="birds holds no images"):
        probe(Refusing(), classify(), DATA)


@pytest.mark.parametrize("scores", [[], [Energy(), Energy(1)]])
def test_no_score_and_one_score_twice_are_refused(scores: list[Score]) -> None:
    with pytest.raises(UserError, match="OutOfDistribution: scores are"):
        OutOfDistribution(scores=scores)
    with pytest.raises(UserError, match="Energy: temperature is 0"):
        Energy(0.0)


def test_its_description_builds_an_equal_probe() -> None:
    probe = OutOfDistribution([*two_sets(), OtherData("digits", build(_digits()))], ALL)
    assert describe(build(describe(probe))) == describe(probe)
    assert describe(build(describe(OutOfDistribution()))) == describe(OutOfDistribution())


def _digits() -> dict[str, object]:
    return {"class_path": "galago.datasets.digits.Digits", "init_args": {"hold_out": 0}}


def test_a_recipe_names_sets_and_scores(tmp_path: Path) -> None:
    given = tmp_path / "recipe.yaml"
    given.write_text(
        f"""
run: {tmp_path / "run"}
model: {{class_path: galago.models.tiny.tiny}}
task: {{class_path: galago.tasks.classify.Classify, init_args: {{classes: 10}}}}
data: {{class_path: galago.datasets.digits.Digits, init_args: {{per_class: 20}}}}
epochs: 1
probes:
  - class_path: galago.probes.out_of_distribution.OutOfDistribution
    init_args:
      scores: [{{class_path: galago.probes.out_of_distribution.NegativeEntropy}}]
      outside:
        - class_path: galago.outside_made_up.Uniform
          init_args: {{images: 30}}
        - class_path: galago.outside.OtherData
          init_args:
            name: large_digits
            data: {{class_path: galago.datasets.digits.Digits, init_args: {{size: 20}}}}
"""
    )
    recipe.train_recipe(["--config", str(given)])
    numbers = recipe.Run(tmp_path / "run").metrics.read_text()
    assert "auroc_entropy_uniform" in numbers
    assert "fpr95_entropy_large_digits" in numbers


def test_it_obeys_the_laws() -> None:
    check_probe(lambda: OutOfDistribution(two_sets(), ALL), trained_network)
    check_probe(
        lambda: OutOfDistribution(two_sets(), [MaximumSoftmax(), Reservation()]),
        lambda: trained_network(),
        make_task=_abstaining,
        make_data=_TwoColors,
    )


def test_a_quantized_network_and_its_file_give_the_same() -> None:
    check_probe(lambda: OutOfDistribution(two_sets(), ALL), _quantized)


def _quantized() -> nn.Module:
    return Quantize(LSQWeight(4), LSQ(4)).prepare(trained_network(60), DATA).eval()


class _TwoColors(TinyImages):
    """The laws' images, where blue counts as red, so that a network with three outputs has one to abstain by."""

    classes = ("red", "green")

    def validation(self) -> list[object]:  # type: ignore[override]
        return [batch._replace(target=batch.target[:, :2]) for batch in super().validation()]


def _abstaining() -> Task:
    return ClassifyOrAbstain(2, 1.5)
