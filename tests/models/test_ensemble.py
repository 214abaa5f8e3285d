"""Networks that answer together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from galago.data import Normalize
from galago.distill.teacher import require_same_normalization
from galago.errors import UserError
from galago.models.ensemble import Ensemble, stacked_scores
from galago.models.resnet import resnet20
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.spec import build, describe
from galago.testing import TinyImages, tiny_network


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


def warmed(member: nn.Module) -> nn.Module:
    """With BatchNorm statistics of its own."""
    member.train()(torch.randn(8, 3, 32, 32))
    return member.eval()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("galago.models.ensemble.say", lines.append)
    return lines


@torch.no_grad()
def test_members_side_by_side_answer_as_they_do_in_turn(told: list[str]) -> None:
    members = [warmed(resnet20()) for _ in range(3)]
    image = torch.randn(4, 3, 32, 32)
    stacked = Ensemble(members, stacked=True).eval()
    torch.testing.assert_close(stacked(image), Ensemble(members)(image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        stacked_scores(stacked.members, image), torch.stack([one(image) for one in members]), rtol=1e-4, atol=1e-4
    )
    assert told == []
    assert stacked._alike


@torch.no_grad()
def test_quantized_members_stand_side_by_side_too_or_say_why_not(told: list[str]) -> None:
    members = [Quantize(LSQWeight(4), LSQ(4)).prepare(tiny_network(), TinyImages()).eval() for _ in range(2)]
    image = torch.randn(3, 3, 8, 8)
    together = Ensemble(members, stacked=True).eval()
    torch.testing.assert_close(together(image), Ensemble(members).eval()(image), rtol=1e-4, atol=1e-4)
    assert together._alike != bool(told)


class Turned(nn.Linear):
    """Of the same shape as another, with another sign."""

    sign = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sign * super().forward(x)


class Picky(nn.Linear):
    """Looks at values, which no network in a stack can."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = super().forward(x)
        return output if bool(output.sum() > 0) else 2 * output


@torch.no_grad()
def test_members_that_cannot_be_stacked_run_in_turn_and_a_line_says_why(told: list[str]) -> None:
    turned = [Turned(4, 3), Turned(4, 3)]
    turned[1].sign = -1.0
    image = torch.randn(2, 4)
    cases = [
        ([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)], "of different architectures"),
        (turned, "but compute differently"),
        ([Picky(4, 3), Picky(4, 3)], "vmap cannot run them as one"),
    ]
    for members, reason in cases:
        together = Ensemble(members, stacked=True).eval()
        for _ in range(2):
            torch.testing.assert_close(together(image), Ensemble(members)(image))
        assert len(told) == 1
        assert reason in told.pop()


def test_gradients_reach_the_image_as_they_do_in_turn() -> None:
    members = [warmed(resnet20()) for _ in range(2)]
    gradients = []
    for stacked in (True, False):
        image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).requires_grad_()
        Ensemble(members, stacked).eval()(image)[:, 3].sum().backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_while_it_trains_and_when_it_is_exported_members_run_in_turn() -> None:
    members = [tiny_network(), tiny_network()]
    together = Ensemble(members, stacked=True)
    together.train()(torch.randn(4, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in together.parameters())
    image = torch.randn(2, 3, 8, 8)
    program = torch.export.export(together.eval(), (image,))
    torch.testing.assert_close(program.module()(image), together(image), rtol=1e-4, atol=1e-4)
    assert describe(together)["init_args"]["stacked"] is True
