"""A network asked several times with dropout on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from galago.draws import Dropping, MeanOfDraws, dropping
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.probe import Deployed, collect
from galago.probes.calibration import Calibration
from galago.probes.monte_carlo_dropout import MonteCarloDropout
from galago.probes.selective import Selective
from galago.regularize.dropout import Dropout
from galago.testing import check_probe


def dropped(rate: float = 0.5) -> nn.Module:
    return Dropout(rate).prepare(tiny_network(), TinyImages())


def measured(network: nn.Module, passes: int) -> dict[str, float]:
    data = TinyImages()
    return MonteCarloDropout(passes)(Deployed(network, data.normalize, classify()), classify(), data)


class Coin(nn.Module):
    """Scores that dropout either leaves out or doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.ones(len(x), 1)) * torch.tensor([1.0, 0.0, 0.0])


def test_numbers_are_those_of_a_mixture_that_is_known() -> None:
    found = measured(Coin(), 3000)
    each = torch.stack([torch.tensor([2.0, 0.0, 0.0]).softmax(0), torch.full((3,), 1 / 3)])
    mean = each.mean(0)
    total = float(-(mean * mean.log()).sum())
    assert found["dropout_accuracy"] == pytest.approx(1 / 3)
    assert found["dropout_entropy"] == pytest.approx(total, abs=0.02)
    assert found["dropout_epistemic"] == pytest.approx(total + float((each * each.log()).sum(1).mean()), abs=0.02)
    assert found["dropout_nll"] == pytest.approx(float(-mean.log().mean()), abs=0.02)
    assert found["dropout_ece"] == pytest.approx(float(mean[0]) - 1 / 3, abs=0.02)


def test_only_dropout_is_on_and_afterwards_all_is_as_before() -> None:
    model = dropped().train()
    model.down.eval()
    modes = [part.training for part in model.modules()]
    with dropping(model):
        assert [type(part) for part in model.modules() if part.training] == [nn.Dropout]
    assert [part.training for part in model.modules()] == modes


def test_one_pass_knows_no_epistemic_doubt_and_more_passes_do() -> None:
    assert measured(dropped(), 1)["dropout_epistemic"] == pytest.approx(0, abs=1e-12)
    assert measured(dropped(), 5)["dropout_epistemic"] > 1e-4


def test_its_numbers_are_those_of_the_other_probes_on_the_mean_answer() -> None:
    data, network = TinyImages(), dropped()
    found = measured(network, 400)
    mean = MeanOfDraws(Dropping(network), 400)
    outputs = collect(Deployed(mean, data.normalize, classify()), data.test())
    other = Calibration().score(outputs, classify()) | Selective().score(outputs, classify())
    assert found["dropout_nll"] == pytest.approx(other["nll"], abs=0.02)
    assert found["dropout_ece"] == pytest.approx(other["ece"], abs=0.05)
    assert found["dropout_aurc_entropy"] == pytest.approx(other["aurc_entropy"], abs=0.05)


def test_without_dropout_there_is_nothing_to_measure() -> None:
    assert measured(tiny_network(), 3) == measured(dropped(0.0), 3) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(lambda: MonteCarloDropout(3))
    check_probe(lambda: MonteCarloDropout(3), dropped, same_on_artifact=False)


def test_no_pass_and_a_network_that_diverged_are_refused() -> None:
    with pytest.raises(UserError, match="passes is 0"):
        MonteCarloDropout(0)
    broken = dropped()
    torch.nn.init.constant_(broken.head.layer.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        measured(broken, 2)
