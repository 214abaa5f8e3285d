"""What the terms that act on class scores have in common: scores and targets of one step, checked."""

from __future__ import annotations

from torch import Tensor

from galago.batch import Step
from galago.errors import UserError
from galago.task import require_probabilities, scores_of


def scores_and_targets(step: Step, method: str) -> tuple[Tensor, Tensor]:
    """Class scores in float32 and class probabilities, N×K both, as the model saw the batch.

    Args:
        step: after the forward pass; of a dict of outputs, `main` counts.
        method: whose mistake it would be.

    Raises:
        UserError: targets are no class probabilities, or there is not one output a class.
    """
    target, scores = require_probabilities(step.batch, method), scores_of(step.output)
    if scores.shape != target.shape:
        raise UserError(
            f"{method} needs one output a class, but the model has {scores.shape[-1]} outputs for {target.shape[1]}"
            " classes; leave it out for a task that abstains"
        )
    return scores.float(), target.float()
