"""Distances to the k-th nearest training image against golden values and a loop; files, laws, wrong settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from galago.deploy.onnx import export
from galago.deploy.runtime import OnnxRuntime
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify
from galago.outside import OtherData
from galago.probe import Deployed
from galago.probes.nearest_neighbors import NearestNeighbors, nearness, of_length_one
from galago.testing import check_probe
from noise import trained_network
from outsiders import Pictures, golden, noise, two_sets

DATA = TinyImages()
KNOWN, K = of_length_one(golden("train_features")), int(golden("knn_k"))


def deployed(network: nn.Module) -> Deployed:
    return Deployed(network, DATA.normalize, classify()).eval()


def test_distances_are_the_golden_ones_and_their_squares_the_benchmarks() -> None:
    found = nearness(golden("features"), KNOWN, K)
    torch.testing.assert_close(found, golden("score_knn"), rtol=0, atol=1e-9)
    torch.testing.assert_close(-found.square(), golden("score_knn_squared"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("k", [1, 2, 60])
def test_distances_agree_with_sorting_them(k: int) -> None:
    scaled = golden("features") / golden("features").norm(dim=1, keepdim=True)
    wanted = [-sorted(float((f - other).norm()) for other in KNOWN)[k - 1] for f in scaled]
    assert nearness(golden("features"), KNOWN, k).tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_training_image_is_its_own_nearest_and_length_does_not_count() -> None:
    assert nearness(golden("train_features"), KNOWN, 1).abs().max() < 1e-12
    feature = golden("features")
    torch.testing.assert_close(nearness(7 * feature, KNOWN, 3), nearness(feature, KNOWN, 3))


def test_the_farther_neighbor_is_never_nearer() -> None:
    distances = torch.stack([nearness(golden("features"), KNOWN, k) for k in range(1, 61)])
    assert (distances.diff(dim=0) <= 0).all()


def test_features_that_are_all_zero_are_one_away_from_everything() -> None:
    assert nearness(torch.zeros(2, 8), KNOWN, 5).tolist() == pytest.approx([-1, -1])


def test_a_trained_networks_own_images_are_nearer_than_blobs() -> None:
    found = NearestNeighbors(two_sets(), k=3)(deployed(trained_network(60)), classify(), DATA)
    assert found["auroc_knn_blobs"] > 0.8


def test_files_are_not_told_of(tmp_path: Path) -> None:
    export(deployed(trained_network(5)), DATA.example(), tmp_path / "model.onnx")
    assert NearestNeighbors(two_sets(), k=3)(OnnxRuntime(tmp_path / "model.onnx"), classify(), DATA) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(lambda: NearestNeighbors(two_sets(), k=5), trained_network, same_on_artifact=False)


def test_more_neighbors_than_training_images_are_refused() -> None:
    with pytest.raises(UserError, match="k is 50, but there are 48 training images"):
        NearestNeighbors(two_sets())(deployed(trained_network()), classify(), DATA)
    with pytest.raises(UserError, match="k is 9; give a number from 1 to training_images, 8"):
        NearestNeighbors(two_sets(), k=9, training_images=8)
    with pytest.raises(UserError, match="k is 0"):
        NearestNeighbors(two_sets(), k=0)
    with pytest.raises(UserError, match="images is 0"):
        NearestNeighbors(two_sets(), images=0)


def test_a_diverged_network_is_refused_by_name() -> None:
    network = trained_network()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="knn: the network's features of training images are no finite"):
        NearestNeighbors(two_sets(), k=3)(deployed(network), classify(), DATA)


def test_images_of_any_size_can_be_outside() -> None:
    probe = NearestNeighbors([OtherData("other", Pictures(noise(7, 1, 20, 13)))], k=3)
    assert 0 <= probe(deployed(trained_network()), classify(), DATA)["auroc_knn_other"] <= 1
