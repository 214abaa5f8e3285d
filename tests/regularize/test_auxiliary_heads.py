"""Losses of the heads beside the answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from galago.batch import Batch
from galago.errors import UserError
from galago.laws.trial import tiny_network
from galago.method import Forward
from galago.models.attention_branch import attention_branch
from galago.regularize.auxiliary_heads import AuxiliaryHeads
from galago.tasks.classify import Classify
from galago.testing import check_method


class TwoHeads(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"main": x, "attention": -2 * x}


def test_every_other_head_adds_its_own_loss() -> None:
    scores, target = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]] * 0.8 + 0.2 / 3
    step = AuxiliaryHeads(0.3).step(Batch(scores, target), Forward(TwoHeads(), Classify(3)))
    assert step.losses.keys() == {"cross_entropy", "cross_entropy_attention"}
    torch.testing.assert_close(step.loss, cross_entropy(scores, target) + 0.3 * cross_entropy(-2 * scores, target))


def test_a_network_with_one_head_trains_as_without() -> None:
    batch = Batch(torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]])
    assert AuxiliaryHeads().step(batch, Forward(nn.Identity(), Classify(3))).losses.keys() == {"cross_entropy"}


def test_it_obeys_the_laws_with_and_without_heads() -> None:
    check_method(AuxiliaryHeads)
    check_method(AuxiliaryHeads, lambda: attention_branch(tiny_network(), "down"))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UserError, match="weight is -1"):
        AuxiliaryHeads(-1)
