"""Targets of single images: how they move, where they are looked up, and that a checkpoint brings them back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.regularize.refined_targets import RefinedTargets, refined

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "slr.npz")


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def predicted(name: str) -> Tensor:
    return (golden(name) / float(GOLDEN["temperature"])).softmax(1)


def one_hot() -> Tensor:
    return torch.eye(4, dtype=torch.float64)[golden("labels")]


def test_anchored_targets_are_the_golden_ones_and_keep_their_label() -> None:
    for scores, expected in (("fold_logits", "targets_anchored"), ("second_round_logits", "targets_anchored_round2")):
        found = refined(one_hot(), predicted(scores), float(GOLDEN["rho"]))
        torch.testing.assert_close(found, golden(expected), rtol=1e-9, atol=1e-12)
        assert torch.equal(found.argmax(1), golden("labels"))
        torch.testing.assert_close(found.sum(1), torch.ones(8, dtype=torch.float64))


def test_free_targets_are_the_golden_ones() -> None:
    first = refined(one_hot(), predicted("fold_logits"), float(GOLDEN["eta"]))
    torch.testing.assert_close(first, golden("targets_free_round1"), rtol=1e-9, atol=1e-12)
    second = refined(first, predicted("second_round_logits"), float(GOLDEN["eta"]))
    torch.testing.assert_close(second, golden("targets_free_round2"), rtol=1e-9, atol=1e-12)


def test_cross_entropy_with_refined_targets_is_the_golden_loss_and_gradient() -> None:
    scores = golden("student_logits").clone().requires_grad_()
    loss = nn.functional.cross_entropy(scores, golden("targets_anchored"))
    torch.testing.assert_close(loss, golden("soft_ce"))
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], golden("soft_ce_grad"), rtol=1e-9, atol=1e-12)


def batch(*index: int) -> Batch:
    return Batch(torch.zeros(len(index), 3, 8, 8), torch.eye(3)[[0] * len(index)], {"index": torch.tensor(index)})


def test_a_target_is_looked_up_by_the_images_number_and_a_label_stays_where_there_is_none() -> None:
    kept = RefinedTargets("Given")
    kept.rows = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    given = batch(2, 1, 0)
    found = kept.looked_up(given).target
    assert found.tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], kept.rows[0].tolist()]
    assert torch.equal(given.target, batch(2, 1, 0).target)


def test_saved_targets_are_there_before_prepare() -> None:
    kept, again = RefinedTargets("Given"), RefinedTargets("Given")
    kept.rows = torch.rand(5, 3)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again.rows, kept.rows)
    again.load_state_dict(again.state_dict())


def test_data_without_numbers_and_targets_that_are_no_probabilities_are_refused() -> None:
    kept = RefinedTargets("Given")
    kept.rows = torch.zeros(3, 3)
    with pytest.raises(UserError, match="do not number their images"):
        kept.looked_up(batch(0)._replace(extra={}))
    with pytest.raises(UserError, match="class probabilities"):
        kept.looked_up(batch(0)._replace(target=torch.tensor([1])))
    data = TinyImages()
    data.images = None
    with pytest.raises(UserError, match="do not say how many"):
        kept.empty(data, torch.device("cpu"))


def test_several_processes_are_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="set devices: 1"):
        RefinedTargets("Given").empty(TinyImages(), torch.device("cpu"))
