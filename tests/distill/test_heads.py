"""The accuracy of every head, while there is more than one."""

from __future__ import annotations

import pytest
import torch

from galago.distill.ensemble import Ensemble
from galago.distill.feature_fusion import FeatureFusion
from galago.distill.heads import HeadAccuracy
from galago.distill.native_ensemble import NativeEnsemble
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.method import Method
from galago.probe import Deployed
from galago.testing import check_probe


def deployed(method: Method) -> Deployed:
    data = TinyImages()
    return Deployed(method.prepare(tiny_network(), data), data.normalize, classify())


@pytest.mark.parametrize(
    ("method", "joint"), [(FeatureFusion(branch_at="stem"), "fused"), (NativeEnsemble("stem", branches=2), "gated")]
)
def test_every_head_is_measured_as_one_would_by_hand(method: Method, joint: str) -> None:
    network, data = deployed(method), TinyImages()
    found = HeadAccuracy()(network, classify(), data)
    images, target = (torch.cat([one[part] for one in data.validation()]) for part in (0, 1))
    assert isinstance(network.network, Ensemble)
    with torch.no_grad():
        heads = network.network.eval().heads(data.normalize(images))
    answers = {"branch_1": heads.branches[0], "branch_2": heads.branches[1], joint: heads.joint}
    answers |= {"ensemble": (heads.branches[0] + heads.branches[1]) / 2}
    assert found.keys() == {f"accuracy_{name}" for name in answers} | {"disagreement"}
    for name, scores in answers.items():
        right = (scores.argmax(1) == target.argmax(1)).double().mean().item()
        assert found[f"accuracy_{name}"] == pytest.approx(right)
    apart = heads.branches[0].argmax(1) != heads.branches[1].argmax(1)
    assert found["disagreement"] == pytest.approx(apart.double().mean().item())
    assert found["disagreement"] > 0  # no branch is another's copy


def test_what_ships_has_one_head_which_the_task_measures() -> None:
    method = FeatureFusion(branch_at="down")
    network = deployed(method)
    network.network = method.finish(network.network)
    assert HeadAccuracy()(network, classify(), TinyImages()) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(HeadAccuracy)
    check_probe(
        HeadAccuracy,
        make_model=lambda: FeatureFusion(branch_at="down").prepare(tiny_network(), TinyImages()),
        same_on_artifact=False,
    )
