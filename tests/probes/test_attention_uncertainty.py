"""Two branches asked several times, and the choice between them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import ROOT
from galago.draws import aleatoric, dropping, entropy, epistemic, log_mean_probability, winner_variance
from galago.errors import UserError
from galago.laws.trial import TinyImages, classify, tiny_network
from galago.models.attention_branch import attention_branch
from galago.models.resnet import resnet20
from galago.probe import Deployed
from galago.probes.attention_uncertainty import AttentionUncertainty, ask, decide, numbers
from galago.testing import check_probe

GOLDEN = np.load(ROOT / "tests/golden/regularization/bayesian_abn.npz")
NEAR = {"rtol": 1e-9, "atol": 1e-12}


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def branched(dropout: float = 0.3) -> nn.Module:
    return attention_branch(tiny_network(), "down", dropout)


@pytest.mark.parametrize("branch", ["attention", "perception"])
def test_uncertainties_are_those_of_the_golden_file(branch: str) -> None:
    scores = golden(f"mc_{branch}_logits")
    torch.testing.assert_close(log_mean_probability(scores).exp(), golden(f"mc_{branch}_mean_probability"), **NEAR)
    for name, measure in (("total", entropy), ("aleatoric", aleatoric), ("epistemic", epistemic)):
        torch.testing.assert_close(measure(scores), golden(f"mc_{branch}_{name}"), **NEAR)
    torch.testing.assert_close(winner_variance(scores), golden(f"mc_{branch}_winner_variance"), **NEAR)


def test_the_choice_is_that_of_the_golden_file() -> None:
    chosen = decide(golden("mc_perception_logits"), golden("mc_attention_logits"))
    assert torch.equal(chosen.perception.long(), golden("mc_selected_branch"))
    assert torch.equal(chosen.probabilities.argmax(1), golden("mc_selected_prediction"))
    torch.testing.assert_close(chosen.uncertainty, golden("mc_selected_uncertainty"), **NEAR)


def test_uncertainties_are_those_of_a_loop_over_images_and_passes() -> None:
    scores = torch.randn(5, 4, 3, dtype=torch.float64) * 3
    for image in range(4):
        probabilities = [torch.softmax(scores[n, image], 0) for n in range(5)]
        mean = sum(probabilities) / 5
        total = -sum(p * p.log() for p in mean)
        each = sum(-sum(p * p.log() for p in one) for one in probabilities) / 5
        winner = int(mean.argmax())
        spread = sum((one[winner] - mean[winner]) ** 2 for one in probabilities) / 5
        torch.testing.assert_close(entropy(scores)[image], total, **NEAR)
        torch.testing.assert_close(aleatoric(scores)[image], each, **NEAR)
        torch.testing.assert_close(epistemic(scores)[image], total - each, **NEAR)
        torch.testing.assert_close(winner_variance(scores)[image], spread, **NEAR)


def test_one_pass_and_certain_scores_hold_no_epistemic_doubt() -> None:
    assert epistemic(torch.randn(1, 9, 4, dtype=torch.float64)).max() < 1e-12
    certain = torch.tensor([[[200.0, 0.0]], [[-200.0, 0.0]]])
    assert torch.isfinite(entropy(certain)).all()
    torch.testing.assert_close(epistemic(certain), torch.full((1,), 2.0).log())


def test_the_less_certain_branch_is_never_chosen_and_perception_is_on_ties() -> None:
    main, attention = torch.randn(2, 6, 50, 4, dtype=torch.float64) * 2
    for measure in (entropy, epistemic, winner_variance):
        chosen = decide(main, attention, measure).uncertainty
        torch.testing.assert_close(chosen, torch.minimum(measure(main), measure(attention)), **NEAR)
    assert decide(main, main).perception.all()


def test_a_trunk_that_runs_once_gives_what_full_passes_give() -> None:
    model = attention_branch(resnet20(), "layer3", 0.3).double()
    image, trunk = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    model.backbone.layer2.register_forward_hook(lambda module, inputs, output: trunk.append(len(output)))
    torch.manual_seed(1)
    once = ask(model, image, 5)
    torch.manual_seed(1)
    with dropping(model), torch.no_grad():
        full = model(image.repeat(5, 1, 1, 1)).unflatten(0, (5, 2))
    assert trunk == [2, 10]
    assert (once.main[0] != once.main[1]).any()
    assert once.maps.shape == (5, 2, 16, 16)
    # the dropout in front of the branch's own scores, which a network that predicts does not compute, comes between
    assert once.attention.shape == full.shape == (5, 2, 10)
    torch.manual_seed(1)
    with dropping(model), model.backbone.layer3.asked(), torch.no_grad():
        full = model(image.repeat(5, 1, 1, 1))
    torch.testing.assert_close(once.main, full["main"].unflatten(0, (5, 2)), **NEAR)
    torch.testing.assert_close(once.attention, full["attention"].unflatten(0, (5, 2)), **NEAR)


def test_dropout_in_the_trunk_rests() -> None:
    network = tiny_network()
    network.block = nn.Sequential(network.block, nn.Dropout(0.5))
    model, taken = attention_branch(network, "down", 0.3), []
    model.backbone.down.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    for _ in range(2):
        ask(model, torch.ones(1, 3, 8, 8), 4)
    assert torch.equal(*taken)
    assert not any(part.training for part in model.eval().modules())


def test_without_dropout_all_passes_are_the_same() -> None:
    said = ask(branched(0.0), torch.randn(3, 3, 8, 8), 4)
    for tensor in said:
        torch.testing.assert_close(tensor[0], tensor[3])
    assert epistemic(said.main.double()).max() < 1e-6


def test_the_choice_is_no_better_than_one_that_is_always_right_where_a_branch_is() -> None:
    data = TinyImages()
    found = AttentionUncertainty(6)(Deployed(branched(), data.normalize, classify()), classify(), data)
    most, least = found["branch_accuracy_oracle"], found["branch_accuracy_attention"]
    assert least <= most
    for name in ("selected", "selected_by_epistemic", "selected_by_variance", "perception"):
        assert found[f"branch_accuracy_{name}"] <= most
    assert found["branch_epistemic"] > 0


def test_the_numbers_are_those_of_a_handful_of_images() -> None:
    main = torch.tensor([[[4.0, 0.0], [0.0, 1.0], [0.0, 2.0]]], dtype=torch.float64)
    attention = torch.tensor([[[0.0, 1.0], [3.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    found = numbers(main, attention, torch.tensor([0, 0, 0]))
    assert found["branch_accuracy_perception"] == pytest.approx(1 / 3)
    assert found["branch_accuracy_attention"] == pytest.approx(2 / 3)
    assert found["branch_accuracy_oracle"] == 1
    assert found["branch_accuracy_selected"] == pytest.approx(2 / 3)
    assert found["branch_share_perception"] == pytest.approx(2 / 3)
    assert found["branch_aurc"] == pytest.approx((0 + 0 + 1 / 3) / 3)


def test_scaled_branches_are_compared_as_if_each_were_as_sure_as_it_should_be() -> None:
    data, model = TinyImages(), branched()
    deployed = Deployed(model, data.normalize, classify())
    found = [AttentionUncertainty(4, scaled)(deployed, classify(), data) for scaled in (False, True)]
    with torch.no_grad():  # one branch far too sure: scaling takes that back
        for parameter in model.backbone.head.parameters():
            parameter.mul_(1e3)
    louder = [AttentionUncertainty(4, scaled)(deployed, classify(), data) for scaled in (False, True)]
    assert louder[0]["branch_share_perception"] > found[0]["branch_share_perception"]
    assert louder[1]["branch_nll"] < louder[0]["branch_nll"]
    for name in ("accuracy_perception", "accuracy_attention", "accuracy_oracle"):
        assert found[1][f"branch_{name}"] <= found[1]["branch_accuracy_oracle"] <= 1


def test_a_network_or_file_without_such_a_branch_gives_nothing() -> None:
    data = TinyImages()
    assert AttentionUncertainty()(Deployed(tiny_network(), data.normalize, classify()), classify(), data) == {}
    with pytest.raises(UserError, match="no attention branch to ask"):
        ask(tiny_network(), torch.zeros(1, 3, 8, 8), 2)


def test_it_obeys_the_laws() -> None:
    check_probe(lambda: AttentionUncertainty(3))
    check_probe(lambda: AttentionUncertainty(3), branched, same_on_artifact=False)
    check_probe(lambda: AttentionUncertainty(3), lambda: branched(0.0), same_on_artifact=False)


def test_no_pass_is_refused() -> None:
    with pytest.raises(UserError, match="passes is 0"):
        AttentionUncertainty(0)
