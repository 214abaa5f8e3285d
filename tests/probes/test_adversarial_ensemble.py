"""Accuracy under an ensemble of attacks: what is broken, what is told of files, what is said of masked gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.attacks import L2, Ball, Linf
from galago.batch import Batch
from galago.deploy.integer import lower
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.distill.noise_injection import NoiseInjection
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.probes.adversarial import Adversarial
from galago.probes.adversarial_ensemble import AutoAttackLite, asked, masks
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.run import Run
from galago.tasks.abstain import ClassifyOrAbstain
from galago.tasks.classify import Classify
from galago.testing import check_probe
from noise import trained_network

DATA = TinyImages()
BY_GRADIENT = ["apgd_ce", "apgd_dlr"]


def deployed(network: nn.Module) -> Deployed:
    return Deployed(network, DATA.normalize, classify()).eval()


def measured(network: nn.Module, probe: AutoAttackLite) -> dict[str, float]:
    """Numbers by name, without what all names begin with."""
    found = probe(deployed(network), classify(), DATA)
    return {name.removeprefix(f"autoattack_{probe.ball.name}_"): number for name, number in found.items()}


WEAK = Linf(0.1)


def small(ball: Ball = WEAK, surrogate: Path | None = None) -> AutoAttackLite:
    return AutoAttackLite(ball, steps=10, queries=40, draws=3, images=24, surrogate=surrogate)


@pytest.fixture
def surrogate(tmp_path: Path) -> Path:
    """A finished run."""
    network = trained_network(60)
    network.__dict__["built_from"] = {
        "class_path": "galago.models.tiny.Tiny",
        "init_args": {"classes": 3, "channels": 3, "width": 5},
    }
    run = Run(tmp_path / "surrogate")
    run.folder.mkdir()
    run.save_model(network, DATA.normalize)
    return run.folder


def test_each_attack_is_made_on_what_the_ones_before_it_left() -> None:
    found = measured(trained_network(60), small())
    attacks = ["clean", *BY_GRADIENT]
    assert list(found) == [
        *(f"{name}_accuracy" for name in [*attacks, "search", "robust"]),
        "mean_gradient",
        "gradient_masking",
    ]
    accuracies = [found[f"{name}_accuracy"] for name in attacks]
    assert accuracies == sorted(accuracies, reverse=True)
    assert found["robust_accuracy"] <= min(found["apgd_dlr_accuracy"], found["search_accuracy"])
    assert found["gradient_masking"] == 0


def test_the_ensemble_is_no_weaker_than_pgd_and_complete_at_last() -> None:
    network = trained_network(60)
    for radius in (0.05, 0.1, 0.2, 1.0):
        found = measured(network, small(Linf(radius)))
        plain = Adversarial(Linf(radius), steps=10, images=24)(deployed(network), classify(), DATA)
        assert found["robust_accuracy"] <= plain[f"linf_{radius:.3g}_pgd_accuracy"]
        assert found["clean_accuracy"] == plain[f"linf_{radius:.3g}_clean_accuracy"]
    assert found["robust_accuracy"] == 0


def test_the_search_alone_breaks_images_in_both_norms() -> None:
    for ball in (Linf(0.2), L2(3.0)):
        found = measured(trained_network(60), AutoAttackLite(ball, steps=2, queries=100, images=24))
        assert found["search_accuracy"] < found["clean_accuracy"]


def test_four_classes_are_attacked_towards_each_of_the_wrong_ones() -> None:
    class FourClasses(TinyImages):
        classes = ("red", "green", "blue", "grey")

        def _batches(self, epoch: int) -> list[Batch]:
            batches = super()._batches(epoch)
            return [one._replace(target=nn.functional.pad(one.target, (0, 1))) for one in batches]

    torch.manual_seed(0)
    network = Deployed(Tiny(classes=4, channels=3, width=5), DATA.normalize, Classify(4)).eval()
    found = small()(network, Classify(4), FourClasses())
    names = [name for name in found if "apgd" in name]
    assert names == [f"autoattack_linf_0.1_apgd_{name}_accuracy" for name in ("ce", "dlr", "targeted")]
    assert found[names[2]] <= found[names[1]]


def test_two_classes_are_attacked_by_cross_entropy_alone() -> None:
    class TwoClasses(TinyImages):
        classes = ("red", "other")

        def _batches(self, epoch: int) -> list[Batch]:
            batches = super()._batches(epoch)
            return [one._replace(target=torch.cat([one.target[:, :1], 1 - one.target[:, :1]], 1)) for one in batches]

    network = Deployed(Tiny(classes=2, channels=3, width=5), DATA.normalize, Classify(2)).eval()
    found = small()(network, Classify(2), TwoClasses())
    assert [name for name in found if "apgd" in name] == ["autoattack_linf_0.1_apgd_ce_accuracy"]


def test_what_stands_for_abstaining_is_no_class_to_be_driven_to() -> None:
    task = ClassifyOrAbstain(3, 2.0)
    network = Deployed(Tiny(classes=4, channels=3, width=5), DATA.normalize, task).eval()
    image = DATA.example()
    assert asked(network, 3, 1)(image).shape == (1, 3)
    assert "autoattack_linf_0.1_robust_accuracy" in small()(network, task, DATA)


class Hidden(nn.Module):
    """The network behind steps so fine that its answers hardly change, and its gradient is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.network = trained_network(60)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.network(torch.round(x * 64) / 64) + 0 * x.mean()
        return scores


def test_a_network_without_useful_gradients_is_found_out(capsys) -> None:
    found = measured(Hidden(), small(Linf(0.2)))
    assert found["mean_gradient"] == 0
    assert found["search_accuracy"] < found["apgd_dlr_accuracy"]
    assert found["robust_accuracy"] <= found["search_accuracy"]
    assert found["gradient_masking"] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "gradient masking: the loss is flat" in said
    assert "search without gradients breaks more" in said


def test_an_attack_on_the_float_network_finds_masking_too(surrogate: Path, capsys) -> None:
    found = measured(Hidden(), small(Linf(0.2), surrogate))
    assert found["transfer_accuracy"] < found["apgd_dlr_accuracy"]
    assert found["robust_accuracy"] <= found["transfer_accuracy"]
    assert "attack on another network breaks more" in " ".join(capsys.readouterr().err.split())


def test_a_sharp_network_shows_no_sign() -> None:
    numbers = {"apgd_ce_accuracy": 0.5, "apgd_dlr_accuracy": 0.25, "search_accuracy": 0.25, "mean_gradient": 1e-6}
    assert masks(numbers) == []
    assert len(masks(numbers | {"transfer_accuracy": 0.2, "mean_gradient": 0.0, "search_accuracy": 0.0})) == 3


def test_a_file_is_told_what_needs_no_gradient_and_the_network_the_same(surrogate: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network, probe = deployed(trained_network(30)), small(Linf(0.2), surrogate)
    export(network, DATA.example(), tmp_path / "model.onnx")
    own, of_file = probe(network, classify(), DATA), probe(OnnxRuntime(tmp_path / "model.onnx"), classify(), DATA)
    assert list(of_file) == [f"autoattack_linf_0.2_{name}_accuracy" for name in ("clean", "search", "transfer")]
    assert all(abs(own[name] - value) <= 1 / 24 for name, value in of_file.items())  # one decision may be a hair's


def test_a_quantized_network_is_measured_with_a_warning_and_its_integer_module_without_gradients(
    capsys, surrogate: Path
) -> None:
    network = Quantize(LSQWeight(4), LSQ(4)).prepare(trained_network(60), DATA).eval()
    assert "robust_accuracy" in measured(network, small())
    assert "stand-ins; name the float run as surrogate" in " ".join(capsys.readouterr().err.split())
    measured(network, small(surrogate=surrogate))
    assert "stand-ins" not in capsys.readouterr().err
    integer = lower(network, DATA.normalize(DATA.example()))
    assert list(measured(integer, small())) == ["clean_accuracy", "search_accuracy"]


def test_a_noisy_network_is_judged_by_its_mean_answer() -> None:
    torch.manual_seed(0)
    noisy = deployed(NoiseInjection(0.5).prepare(trained_network(60), DATA).eval())
    image = DATA.test()[0].input
    torch.manual_seed(1)
    mean = asked(noisy, 3, 8)(image).softmax(1)
    torch.manual_seed(1)
    answers = torch.stack([noisy(image).softmax(1) for _ in range(8)])
    torch.testing.assert_close(mean, answers.mean(0))


def test_it_obeys_the_laws_with_and_without_noise() -> None:
    check_probe(small, same_on_artifact=False)
    check_probe(
        lambda: AutoAttackLite(L2(), steps=2, queries=3, draws=2, images=8),
        lambda: NoiseInjection().prepare(tiny_network(), DATA),
        same_on_artifact=False,
    )


def test_a_surrogate_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run"):
        measured(trained_network(), small(surrogate=tmp_path))


@pytest.mark.parametrize("name", ["steps", "targets", "queries", "draws", "images"])
def test_numbers_that_mean_nothing_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"AutoAttackLite: {name} is 0"):
        AutoAttackLite(**{name: 0})
