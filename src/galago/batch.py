"""What flows through training: a `Batch` goes in, a `Step` comes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Inputs and what they should become. Immutable: a method that changes one returns a new one.

    `input` is N×C×H×W (N×T×C×H×W for clips): raw images (uint8) as a loader gives them, normalized floats once
    the `Learner` has taken them in; methods and models only ever see the latter.
    `target` is what the task's losses understand; in classification always class probabilities N×K, so that
    mixing, smoothing and refining need no special case.
    `extra` is whatever the data set also knows: `index` (position in the full training set), camera, modality.
    """

    input: Tensor
    target: Any
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple's default; nothing ever writes to it


class Step(NamedTuple):
    """One batch after the forward pass: what the network said and every loss it incurred.

    `batch` is as the model saw it. `output` is a tensor, or a dict of named tensors (main, auxiliary heads).
    `losses` are already weighted: the trainer minimizes their sum and logs each.
    """

    batch: Batch
    output: Any
    losses: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """The sum of all losses, a scalar."""
        return torch.stack([loss.float() for loss in self.losses.values()]).sum()

    def add(self, **losses: Tensor) -> Step:
        """The same step with further losses.

        Raises:
            ValueError: a loss of that name is already there (the same method twice); it would be lost silently.
        """
        if twice := self.losses.keys() & losses.keys():
            raise ValueError(f"loss {sorted(twice)} is already in this step; give the second method another loss name")
        return self._replace(losses={**self.losses, **losses})
