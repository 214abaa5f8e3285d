"""Accuracy under attack: what is attacked, by what, and what is told of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from galago.attacks import L2, Ball, Linf, against, pgd, whole_levels
from galago.deploy.integer import lower
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.distill.noise_injection import NoiseInjection
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.probe import Deployed, evaluating, has_gradients
from galago.probes.adversarial import Adversarial, draws_noise
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.run import Run
from galago.testing import check_probe
from noise import trained_network

DATA = TinyImages()
RAW = DATA.train()[0].input


def deployed(network: nn.Module) -> Deployed:
    return Deployed(network, DATA.normalize, classify()).eval()


def measured(network: nn.Module, probe: Adversarial) -> dict[str, float]:
    return probe(deployed(network), classify(), DATA)


def noisy(alpha: float) -> nn.Module:
    return NoiseInjection(alpha).prepare(trained_network(60), DATA).eval()


def by_hand(network: nn.Module, ball: Ball, step: float, steps: int) -> float:
    """Accuracy under PGD without a random start."""
    whole, right = deployed(network), 0
    for batch in DATA.test():
        found = pgd(batch.input / 255, against(whole, batch.target), ball, step, steps)
        right += int((whole(found).argmax(1) == batch.target.argmax(1)).sum())
    return right / 48


def test_accuracies_are_those_of_attacks_on_pixels_before_normalization() -> None:
    network, ball = trained_network(60), Linf(0.1)
    found = measured(network, Adversarial(ball))
    assert list(found) == [f"linf_0.1_{name}_accuracy" for name in ("clean", "fgsm", "pgd")]
    clean, one, many = found.values()
    assert clean == by_hand(network, ball, 0.0, 1)
    assert one == by_hand(network, ball, 0.1, 1)
    assert many <= by_hand(network, ball, 0.025, 10) + 2 / 48
    assert many <= one < clean


def test_success_grows_with_the_radius_and_is_complete_at_last() -> None:
    network = trained_network(60)
    for balls in ([Linf(e) for e in (0.02, 0.1, 0.3, 1.0)], [L2(e) for e in (0.3, 1.0, 3.0, 20.0)]):
        accuracies = [measured(network, Adversarial(ball))[f"{ball.name}_pgd_accuracy"] for ball in balls]
        assert accuracies == sorted(accuracies, reverse=True)
        assert accuracies[-1] == 0


def test_gradients_averaged_over_draws_fool_a_noisy_network_more() -> None:
    class NoisyGradient(nn.Module):
        """Whose gradient hangs on the draw far more than its answer: the noise is a slope that sums to nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.network = trained_network(60)

        def forward(self, x: Tensor) -> Tensor:
            slope = torch.randn(3, *x.shape[1:])
            distraction = 0.2 * (x - x.detach()).flatten(1) @ slope.flatten(1).T
            scores: Tensor = self.network(x) + distraction + 1e-3 * torch.randn(3)
            return scores

    found = [measured(NoisyGradient(), Adversarial(Linf(0.2), draws=draws)) for draws in (1, 16)]
    for attack in ("fgsm", "pgd"):
        one, many = (accuracies[f"linf_0.2_{attack}_accuracy"] for accuracies in found)
        assert many < one - 0.3


def test_only_a_network_that_draws_is_asked_several_times() -> None:
    class Counting(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.passes = network, 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            scores: Tensor = self.network(x)
            return scores

    counts = []
    for network in (trained_network(), noisy(0.5)):
        counting = Counting(network)
        measured(counting, Adversarial(steps=2, draws=5, images=8))
        counts.append(counting.passes)
    # one batch: a look at gradients, two at noise; clean, FGSM, PGD; gradients of one and of two steps
    assert counts[0] == 3 + 3 + 3
    assert counts[1] == 3 + 3 + 3 * 5
    assert draws_noise(deployed(noisy(0.5)), RAW)
    assert not draws_noise(deployed(noisy(0.0)), RAW)


def test_more_starts_are_a_stronger_attack() -> None:
    network, ball = trained_network(), Linf(0.2)
    weak = measured(network, Adversarial(ball, steps=1, step_size=0.1))
    strong = measured(network, Adversarial(ball, steps=1, step_size=0.1, restarts=10))
    assert strong["linf_0.2_pgd_accuracy"] < weak["linf_0.2_pgd_accuracy"]


def test_so_many_images_are_attacked_from_the_whole_set() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean((2, 3))

    measured(Watching(), Adversarial(images=12, steps=1))
    assert len(torch.cat(seen).unique(dim=0)) >= 12
    clean = {tuple(image.flatten().tolist()) for image in torch.cat(seen)}
    own = [DATA.normalize(image[None])[0] for batch in DATA.test() for image in batch.input]
    found = [number for number, image in enumerate(own) if tuple(image.flatten().tolist()) in clean]
    assert found == list(range(0, 48, 4))


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


def test_a_file_is_attacked_by_transfer_alone_and_the_network_equally_much(surrogate: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    network = deployed(trained_network(30))
    export(network, DATA.example(), tmp_path / "model.onnx")
    probe = Adversarial(Linf(0.2), steps=4, surrogate=surrogate)
    own, of_file = probe(network, classify(), DATA), probe(OnnxRuntime(tmp_path / "model.onnx"), classify(), DATA)
    assert list(own) == [f"linf_0.2_{name}_accuracy" for name in ("clean", "fgsm", "pgd", "transfer")]
    assert list(of_file) == [f"linf_0.2_{name}_accuracy" for name in ("clean", "transfer")]
    assert all(own[name] == value for name, value in of_file.items())
    assert of_file["linf_0.2_transfer_accuracy"] < of_file["linf_0.2_clean_accuracy"]
    without = Adversarial(Linf(0.1))(OnnxRuntime(tmp_path / "model.onnx"), classify(), DATA)
    assert list(without) == ["linf_0.1_clean_accuracy"]


def test_an_attack_on_the_network_itself_transfers_to_it(surrogate: Path) -> None:
    found = measured(trained_network(60), Adversarial(Linf(0.2), surrogate=surrogate))
    assert abs(found["linf_0.2_transfer_accuracy"] - found["linf_0.2_pgd_accuracy"]) <= 2 / 48


def test_a_surrogate_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run"):
        measured(trained_network(), Adversarial(surrogate=tmp_path))


@pytest.mark.parametrize("ball", [Linf(8 / 255), Linf(0.0333), L2(0.5)])
def test_whole_levels_change_no_image_by_more_than_the_attack(ball: Ball) -> None:
    image = RAW / 255
    attacked = ball.project(image + 0.1 * torch.randn_like(image), image)
    found = whole_levels(attacked, RAW)
    assert found.dtype == torch.uint8
    assert (found / 255 - attacked).abs().max() < 1 / 255
    assert ((found / 255 - image).abs() <= (attacked - image).abs() + 1e-5).all()
    if ball.name == "linf_0.0314":
        assert (found.int() - RAW).abs().max() == 8  # which survives the float's last digit


def test_a_quantized_network_has_gradients_and_its_integer_module_none() -> None:
    network = Quantize(LSQWeight(4), LSQ(4)).prepare(trained_network(60), DATA).eval()
    assert has_gradients(deployed(network), RAW)
    assert "linf_0.0314_pgd_accuracy" in measured(network, Adversarial(steps=2))
    integer = lower(network, DATA.normalize(RAW[:1]))
    assert list(measured(integer, Adversarial())) == ["linf_0.0314_clean_accuracy"]


def test_a_moving_average_of_the_network_which_does_not_train_is_measured_too() -> None:
    network = trained_network(60)
    wanted = measured(network, Adversarial(steps=2))
    assert measured(network.requires_grad_(False), Adversarial(steps=2)) == wanted
    with torch.no_grad(), evaluating(network):
        assert measured(network, Adversarial(steps=2)) == wanted


def test_it_obeys_the_laws_with_and_without_noise() -> None:
    check_probe(lambda: Adversarial(steps=2, restarts=2), same_on_artifact=False)
    check_probe(
        lambda: Adversarial(L2(), steps=2, draws=2),
        lambda: NoiseInjection().prepare(tiny_network(), DATA),
        same_on_artifact=False,
    )


@pytest.mark.parametrize("name", ["steps", "restarts", "draws", "images"])
def test_numbers_that_mean_nothing_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        Adversarial(**{name: 0})
    with pytest.raises(UserError, match="step_size is 0"):
        Adversarial(step_size=0.0)
