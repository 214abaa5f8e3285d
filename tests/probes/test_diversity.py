"""How far the members of an ensemble differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.laws.trial import TinyImages, classify, tiny_network
from galago.models.ensemble import Ensemble
from galago.probe import Deployed
from galago.probes.diversity import Diversity
from galago.testing import check_probe


class Always(nn.Module):
    """Decides for one class whatever it sees."""

    def __init__(self, decision: int) -> None:
        super().__init__()
        self.decision = decision

    def forward(self, x: Tensor) -> Tensor:
        return 40 * torch.eye(3)[[self.decision] * len(x)]


def measured(network: nn.Module) -> dict[str, float]:
    data = TinyImages()
    return Diversity()(Deployed(network, data.normalize, classify()), classify(), data)


def test_two_of_three_members_agree_on_nothing_with_the_third() -> None:
    found = measured(Ensemble([Always(0), Always(0), Always(1)]))
    assert found["members_disagreement"] == pytest.approx(2 / 3)
    assert found["members_accuracy_mean"] == pytest.approx(1 / 3)
    assert found["members_accuracy_std"] == pytest.approx(0)
    share = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    assert found["members_epistemic"] == pytest.approx(float(-(share * share.log()).sum()))


def test_copies_and_a_member_alone_never_disagree() -> None:
    network = tiny_network()
    for ensemble in (Ensemble([network, network]), Ensemble([network])):
        found = measured(ensemble)
        assert found["members_disagreement"] == 0
        assert found["members_epistemic"] == pytest.approx(0, abs=1e-9)


def test_what_is_no_ensemble_gives_nothing() -> None:
    assert measured(tiny_network()) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(Diversity)
    check_probe(Diversity, lambda: Ensemble([tiny_network(), tiny_network()]), same_on_artifact=False)
