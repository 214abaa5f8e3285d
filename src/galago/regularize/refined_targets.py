"""What methods that refine targets have in common: one target for each training image, and how it moves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data
from galago.errors import UserError
from galago.task import require_probabilities


def refined(before: Tensor, predicted: Tensor, share: float) -> Tensor:
    """`(1 - ρ) q + ρ p̂`, N×K; from one-hot labels it is the anchored form, from the last targets the free one.

    >>> refined(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]), 0.3)
    tensor([[0.8500, 0.1500]])
    """
    return (1 - share) * before + share * predicted


class RefinedTargets(nn.Module):
    """A target for every training image, looked up by its number; part of a method's state.

    Args:
        owner: the method, for what a user is told.

    Attributes:
        rows: images×K, zeros where an image keeps the label that it has; None before there are any.
    """

    rows: Tensor | None

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.register_buffer("rows", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}rows")
        if self.rows is None and isinstance(saved, Tensor):
            self.rows = torch.empty_like(saved)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def empty(self, data: Data, device: torch.device) -> Tensor:
        """Rows of zeros.

        Raises:
            UserError: the data do not say how many images there are, or several processes train.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError(f"{self.owner} refines targets in one process; set devices: 1")
        if data.images is None:
            raise UserError(
                f"{self.owner} keeps a target for every training image, but these data do not say how many there are;"
                " give your data class an attribute `images`"
            )
        return torch.zeros(data.images, len(data.classes), device=device)

    def numbers(self, batch: Batch) -> Tensor:
        """Which training images a batch holds.

        Raises:
            UserError: the data do not say, or targets are no class probabilities.
        """
        if "index" not in batch.extra:
            raise UserError(f"{self.owner}: these data do not number their images; have them give `extra['index']`")
        require_probabilities(batch, self.owner)
        return batch.extra["index"]

    def looked_up(self, batch: Batch) -> Batch:
        """The batch with its images' targets, and with the labels that it has where there are none yet."""
        assert self.rows is not None, "prepare comes first"
        found = self.rows[self.numbers(batch)].to(batch.target.dtype)
        return batch._replace(target=torch.where(found.sum(1, keepdim=True) > 0, found, batch.target))
