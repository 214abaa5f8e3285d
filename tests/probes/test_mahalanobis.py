"""Distances to class means against brute force and golden values; degenerate features, files, laws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.deploy.integer import lower
from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify
from galago.outside import OtherData
from galago.probe import Deployed
from galago.probes.embedding import embedding
from galago.probes.mahalanobis import Gaussians, Mahalanobis, gaussians, mahalanobis
from galago.probes.stepping import stepped
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.testing import check_probe
from noise import trained_network
from outsiders import Pictures, golden, golden_network, noise, two_sets

DATA = TinyImages()
LABEL = golden("train_labels").long()


def deployed(network: nn.Module) -> Deployed:
    return Deployed(network, DATA.normalize, classify()).eval()


def fitted(shrinkage: float = 0.0) -> Gaussians:
    return gaussians(golden("train_features"), LABEL, shrinkage)


def close(found: Tensor, name: str, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, golden(name), rtol=0, atol=tolerance)


def test_means_and_tied_covariance_are_the_golden_ones() -> None:
    close(fitted().means, "class_means")
    close(fitted().covariance, "tied_covariance")


def test_distances_are_the_golden_ones_with_and_without_shrinkage() -> None:
    # the inverse multiplies rounding by the covariance's condition
    torch.testing.assert_close(
        mahalanobis(golden("features"), fitted()), golden("score_mahalanobis_eps0"), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        mahalanobis(golden("features"), fitted(1e-6)), golden("score_mahalanobis_shrunk"), rtol=1e-9, atol=0
    )


def test_distances_behind_a_step_are_the_golden_ones() -> None:
    network, x, epsilon = golden_network(), golden("x"), float(golden("mahalanobis_epsilon"))
    with embedding(network) as embed:
        moved = stepped(x, lambda seen: -mahalanobis(embed(seen), fitted()), epsilon)
        close(mahalanobis(embed(moved), fitted()).detach(), "score_mahalanobis_eps", 1e-6)


def test_features_are_what_the_classifier_takes_in_and_hooks_are_gone_afterwards() -> None:
    network = golden_network()
    with embedding(network) as embed:
        close(embed(golden("x")).detach(), "features")
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(RuntimeError, match="stop"), embedding(network):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in network.modules())


def test_features_with_positions_are_averaged_over_these() -> None:
    network = nn.Sequential(nn.Flatten(2), nn.Linear(64, 4))
    with embedding(deployed(network)) as embed:
        image = DATA.train()[0].input
        torch.testing.assert_close(embed(image), DATA.normalize(image).flatten(2).mean(1))


def test_distances_agree_with_a_loop_over_images_and_classes() -> None:
    feature, classes = golden("features"), fitted(1e-3)
    inverse = torch.linalg.inv(classes.covariance + 1e-3 * classes.covariance.trace() / 8 * torch.eye(8))
    wanted = [max(-0.5 * float((f - m) @ inverse @ (f - m)) for m in classes.means) for f in feature]
    assert mahalanobis(feature, classes).tolist() == pytest.approx(wanted, rel=1e-9)


def test_a_class_mean_has_no_distance_and_all_distances_are_below() -> None:
    classes = fitted(1e-6)
    assert mahalanobis(classes.means, classes).tolist() == [0] * 5
    assert (mahalanobis(golden("features"), classes) < 0).all()


def test_features_stretched_alike_are_as_far_as_before() -> None:
    stretch = torch.randn(8, 8, dtype=torch.float64)
    own = mahalanobis(golden("features"), fitted())
    found = mahalanobis(golden("features") @ stretch, gaussians(golden("train_features") @ stretch, LABEL, 0.0))
    torch.testing.assert_close(found, own, rtol=1e-6, atol=0)


def test_classes_without_an_image_have_no_mean() -> None:
    known = LABEL != 2
    found = gaussians(golden("train_features")[known], LABEL[known])
    torch.testing.assert_close(found.means, fitted().means[[0, 1, 3, 4]])
    assert mahalanobis(golden("features"), found).isfinite().all()


def test_features_that_never_change_do_no_harm() -> None:
    dead = golden("train_features").clone()
    dead[:, 3] = 0
    assert mahalanobis(golden("features"), gaussians(dead, LABEL)).isfinite().all()
    nothing = gaussians(torch.zeros(6, 4), torch.arange(6) % 2)
    assert mahalanobis(torch.zeros(3, 4), nothing).tolist() == [0, 0, 0]


def test_it_is_measured_on_features_of_training_images() -> None:
    network = trained_network(60)
    found = Mahalanobis(two_sets(), training_images=24)(deployed(network), classify(), DATA)
    batches = DATA.train()[:3]
    with embedding(deployed(network)) as embed, torch.no_grad():
        classes = gaussians(
            torch.cat([embed(batch.input) for batch in batches]), torch.cat([b.target for b in batches]).argmax(1)
        )
        scores = [
            torch.cat([mahalanobis(embed(batch.input), classes) for batch in view])
            for view in (DATA.test(), two_sets()[0].test(DATA))
        ]
    share = (scores[0][:, None] > scores[1]).double().mean()
    assert found["auroc_mahalanobis_uniform"] == pytest.approx(float(share), abs=1e-6)
    assert found["auroc_mahalanobis_uniform"] > 0.6


def test_a_step_changes_the_numbers() -> None:
    others = [OtherData("later", Pictures(torch.cat([batch.input for batch in DATA.train(epoch=3)])))]
    own, moved = (Mahalanobis(others, e)(deployed(trained_network(60)), classify(), DATA) for e in (0.0, 0.05))
    assert own.keys() == moved.keys()
    assert own != moved


def test_a_quantized_network_is_told_of_and_files_and_integer_modules_are_not(tmp_path: Path) -> None:
    network = Quantize(LSQWeight(4), LSQ(4)).prepare(trained_network(60), DATA).eval()
    assert "auroc_mahalanobis_blobs" in Mahalanobis(two_sets(), 0.01)(deployed(network), classify(), DATA)
    integer = lower(network, DATA.normalize(DATA.example()))
    assert Mahalanobis(two_sets())(deployed(integer), classify(), DATA) == {}
    export(deployed(trained_network(5)), DATA.example(), tmp_path / "model.onnx")
    assert Mahalanobis(two_sets())(OnnxRuntime(tmp_path / "model.onnx"), classify(), DATA) == {}


def test_it_obeys_the_laws_with_and_without_a_step() -> None:
    check_probe(lambda: Mahalanobis(two_sets()), trained_network, same_on_artifact=False)
    check_probe(lambda: Mahalanobis(two_sets(), 0.01, images=16), trained_network, same_on_artifact=False)


def test_a_network_without_a_linear_layer_says_what_it_lacks() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 8), nn.Flatten())
    with pytest.raises(UserError, match="no linear layer that would be its classifier"):
        Mahalanobis(two_sets())(deployed(network), classify(), DATA)


def test_no_training_images_are_refused() -> None:
    class NoTraining(TinyImages):
        def train(self, epoch: int = 0, start: int = 0) -> list[Batch]:
            return []

    with pytest.raises(UserError, match="mahalanobis: there are no training images"):
        Mahalanobis(two_sets())(deployed(trained_network()), classify(), NoTraining())


def test_a_diverged_network_is_refused_by_name() -> None:
    network = trained_network()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="mahalanobis: the network's features of training images are no finite"):
        Mahalanobis(two_sets())(deployed(network), classify(), DATA)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": -1.0}, "epsilon -1 and shrinkage"),
        ({"shrinkage": -1.0}, "shrinkage -1 must be 0 or more"),
        ({"training_images": 1}, "training_images 1 must be at least 2"),
        ({"images": 0}, "images 0 at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mahalanobis(two_sets(), **wrong)


def test_images_of_any_size_can_be_outside() -> None:
    probe = Mahalanobis([OtherData("other", Pictures(noise(7, 1, 20, 13)))])
    assert 0 <= probe(deployed(trained_network()), classify(), DATA)["auroc_mahalanobis_other"] <= 1
