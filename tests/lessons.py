"""The official code's numbers for distillation losses, and what a lesson is given: what tests of lessons share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from galago.batch import Batch
from galago.distill.lesson import Seen, View

FOLDER = Path(__file__).parent / "golden" / "distillation"


class Golden:
    """Arrays of one file, in float64."""

    def __init__(self, name: str, prefix: str = "kd_") -> None:
        self.file = np.load(FOLDER / f"{prefix}{name}.npz")

    def __call__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.file[name]))

    def learnt(self, name: str) -> Tensor:
        return self(name).clone().requires_grad_()


def equal(found: Tensor, expected: Tensor, scale: float = 1e-9) -> None:
    """Within the tolerance of the golden vectors: a share of the largest value."""
    assert (found.detach() - expected).abs().max() <= scale * expected.abs().max() + 1e-12


def seen(student: list[Tensor], teacher: list[Tensor], scores: Tensor | None = None) -> Seen:
    """What a lesson on features is given."""
    said = torch.zeros(len(student[0]), 2) if scores is None else scores
    return Seen(View(said, student), View(said, teacher), Batch(said, said), 0.5)
