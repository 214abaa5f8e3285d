"""Scores that are computed once: when the teacher is asked, what is refused, and that a run notices nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.distill.attention import Attention
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.distill.stored import EVERY, StoredScores
from galago.errors import UserError
from galago.laws.trial import TinyImages
from galago.testing import check_method, tiny_network


class Teacher(nn.Module):
    """Counts the batches that it is asked about."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))
        self.asked = 0

    def forward(self, image: Tensor) -> Tensor:
        self.asked += 1
        return image.mean((2, 3)) @ self.weight


def batch(*index: int) -> Batch:
    images = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    return Batch(images[list(index)], torch.eye(3)[[0] * len(index)], {"index": torch.tensor(index)})


def stored_by(teacher: nn.Module, file: Path, images: int = 8) -> StoredScores:
    made = StoredScores(teacher, file)
    made.images = images
    return made


def test_an_image_is_computed_once_and_its_scores_are_the_teachers(tmp_path: Path) -> None:
    teacher = Teacher()
    stored = stored_by(teacher, tmp_path / "deep" / "scores.npy", 8)
    first = stored.answer(batch(3, 1))
    torch.testing.assert_close(first, teacher(batch(3, 1).input))
    stored.answer(batch(1, 3))  # the first that is looked up is compared
    asked = teacher.asked
    assert torch.equal(stored.answer(batch(1, 3)), first.flip(0))
    assert teacher.asked == asked
    torch.testing.assert_close(stored.answer(batch(1, 5)), teacher(batch(1, 5).input))
    rows = np.load(tmp_path / "deep" / "scores.npy", mmap_mode="r")
    assert np.isfinite(rows).all(1).nonzero()[0].tolist() == [1, 3, 5]


def test_another_run_goes_on_with_the_same_file(tmp_path: Path) -> None:
    expected = stored_by(Teacher(), tmp_path / "scores.npy", 8).answer(batch(0, 1, 2))
    again = stored_by(Teacher(), tmp_path / "scores.npy", 8)
    again.answer(batch(2))
    asked = again.teacher.asked
    assert torch.equal(again.answer(batch(0, 1)), expected[:2])
    assert again.teacher.asked == asked


def test_the_scores_of_another_teacher_or_of_other_data_are_refused(tmp_path: Path) -> None:
    stored_by(Teacher(), tmp_path / "scores.npy", 8).answer(batch(0))
    for other in (
        stored_by(Teacher(seed=1), tmp_path / "scores.npy", 8),
        stored_by(Teacher(), tmp_path / "scores.npy", 9),
    ):
        with pytest.raises(UserError, match=r"scores.npy holds the scores of another teacher or of other data"):
            other.answer(batch(0))


def test_images_that_are_not_those_that_were_stored_are_noticed(tmp_path: Path) -> None:
    stored = stored_by(Teacher(), tmp_path / "scores.npy", 8)
    stored.answer(batch(0, 1))
    with pytest.raises(UserError, match="it sees other images than those"):
        stored.answer(batch(0, 1)._replace(input=batch(2, 3).input))


def test_they_are_noticed_later_too(tmp_path: Path) -> None:
    stored = stored_by(Teacher(), tmp_path / "scores.npy", 8)
    for _ in range(2):
        stored.answer(batch(0, 1))
    other = batch(0, 1)._replace(input=batch(2, 3).input)
    with pytest.raises(UserError, match="sees other images"):
        for _ in range(EVERY):
            stored.answer(other)


def test_images_without_a_number_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not number their images"):
        stored_by(Teacher(), tmp_path / "scores.npy", 4).answer(batch(0)._replace(extra={}))
    with pytest.raises(UserError, match="do not number their images"):
        StoredScores(Teacher(), tmp_path / "scores.npy").answer(batch(0))


def test_lessons_on_layers_need_the_network_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a StoredScores has no features"):
        Distill(StoredScores(tiny_network(), tmp_path / "scores.npy"), [Attention(layers=[-1])])


def test_it_obeys_the_laws_and_trains_as_with_the_teacher_itself(tmp_path: Path) -> None:
    teacher = tiny_network()
    check_method(lambda: Distill(StoredScores(teacher, tmp_path / "scores.npy"), [SoftTargets()]))
    whole = next(iter(TinyImages().train()))
    normalized = whole._replace(input=TinyImages().normalize(whole.input))
    fresh = stored_by(teacher, tmp_path / "fresh.npy", 48)
    for _ in range(3):
        torch.testing.assert_close(fresh.answer(normalized), teacher(normalized.input))
