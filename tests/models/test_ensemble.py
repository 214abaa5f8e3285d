"""Networks that answer together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.data import Normalize
from galago.distill.teacher import require_same_normalization
from galago.errors import UserError
from galago.models.ensemble import Ensemble
from galago.spec import build, describe
from galago.testing import tiny_network


def test_the_answer_is_the_mean_of_probabilities_also_where_one_member_is_very_sure() -> None:
    members = [nn.Linear(3, 3) for _ in range(2)]
    scores = [torch.tensor([[500.0, 0.0, -3.0]]), torch.tensor([[0.0, 1.0, 2.0]])]
    for member, said in zip(members, scores, strict=True):
        nn.init.zeros_(member.weight)
        member.bias.data = said[0]
    answer = Ensemble(members)(torch.zeros(1, 3))
    torch.testing.assert_close(answer.exp().double(), sum(z.double().softmax(1) for z in scores) / 2)
    assert answer.isfinite().all()


def test_one_member_alone_decides_as_by_itself() -> None:
    member, image = tiny_network().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(Ensemble([member])(image).softmax(1), member(image).softmax(1))


def test_what_it_is_made_of_can_be_written_down() -> None:
    members = [nn.Linear(2, 3), nn.Linear(2, 3, bias=False)]
    again = build(describe(Ensemble(members)))
    assert isinstance(again, Ensemble)
    assert [member.bias is None for member in again.members] == [False, True]


def test_members_must_know_the_same_classes() -> None:
    with pytest.raises(UserError, match=r"\[2, 3\] classes apart"):
        Ensemble([nn.Linear(4, 2), nn.Linear(4, 3)])(torch.zeros(1, 4))
    with pytest.raises(UserError, match="members is empty"):
        Ensemble([])


def test_a_member_with_another_normalization_cannot_teach() -> None:
    one, other = tiny_network(), tiny_network()
    one.__dict__["normalization"] = Normalize([0.5] * 3, [0.25] * 3)
    other.__dict__["normalization"] = Normalize([0.4] * 3, [0.25] * 3)
    require_same_normalization(Ensemble([one, one]), Normalize([0.5] * 3, [0.25] * 3))
    with pytest.raises(UserError, match=r"normalized with mean \[0.4, 0.4, 0.4\]"):
        require_same_normalization(Ensemble([one, other]), Normalize([0.5] * 3, [0.25] * 3))
