"""Ensemble: several networks for the same classes answer as one, by the mean of their probabilities.

Balaji Lakshminarayanan, Alexander Pritzel, Charles Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", NIPS 2017, arXiv:1612.01474.

    p(x) = (1/M) Σ_m softmax(z_m(x))        the scores that are given: log p(x)

When: as a teacher better than any of its members, or where calibrated answers are worth M times the cost. Members that
differ in nothing but the seed of their training are enough.

    teacher:
      class_path: galago.models.ensemble.Ensemble
      init_args:
        members:
          - {class_path: galago.run.load, init_args: {run: runs/seed0}}
          - {class_path: galago.run.load, init_args: {run: runs/seed1}}

Recipe: recipes/distill/ensemble_resnet20_cifar10.yaml.

`stacked: true` runs members of one architecture as one (`torch.func`), which saves launches on a GPU where networks are
small, and nothing on a CPU. What cannot run so, and what is trained, compiled or exported, runs one member after
another, and a line says why. `galago.probes.diversity` measures how far the members differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn, vmap
from torch.func import functional_call, stack_module_state

from galago.console import say
from galago.draws import log_mean_probability
from galago.errors import UserError
from galago.task import scores_of


class Ensemble(nn.Module):
    """Networks that answer together.

    Args:
        members: trained for the same classes and the same normalization.
        stacked: run members of one architecture as one when they predict; else one after another.
    """

    def __init__(self, members: Sequence[nn.Module], stacked: bool = False) -> None:
        super().__init__()
        if not members:
            raise UserError("Ensemble: members is empty; name the networks that answer together")
        self.members, self.stacked = nn.ModuleList(members), stacked
        self._tried: list[int] = []  # the parts that were compared, by identity
        self._alike = False

    def forward(self, image: Tensor) -> Tensor:
        """Normalized images to the logarithm of the mean probability, N×K."""
        if self.stacked and not self.training and not torch.compiler.is_compiling() and self._can_stack(image):
            return log_mean_probability(stacked_scores(self.members, image))
        return log_mean_probability(self.in_turn(image))

    def in_turn(self, image: Tensor) -> Tensor:
        """Every member's scores, M×N×K, one after another."""
        scores = [scores_of(member(image)) for member in self.members]
        if len(sizes := {said.shape[1] for said in scores}) > 1:
            raise UserError(f"Ensemble: its members tell {sorted(sizes)} classes apart; they must know the same ones")
        return torch.stack(scores)

    def _can_stack(self, image: Tensor) -> bool:
        """Whether running all members as one gives what they give in turn; tried once, and anew when parts change."""
        parts = [id(part) for part in self.modules()]
        if parts != self._tried:
            with torch.no_grad():
                reason = obstacle(self.members, image[:2], self.in_turn(image[:2]))
            self._tried, self._alike = parts, not reason
            if reason:
                say(f"Ensemble: members run one after another: {reason}")
        return self._alike


def stacked_scores(members: nn.ModuleList, image: Tensor) -> Tensor:
    """Scores M×N×K of networks of one architecture, their weights side by side in one pass.

    Gradients reach the image, not the weights.
    """
    code = members[0]
    parameters, buffers = stack_module_state(list(members))

    def member(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return scores_of(functional_call(code, (parameters, buffers), (image,)))

    scores: Tensor = vmap(member, randomness="different")(parameters, buffers)
    return scores


def obstacle(members: nn.ModuleList, image: Tensor, wanted: Tensor) -> str:
    """Why networks cannot run as one; empty if they can.

    Args:
        members: in evaluation mode.
        image: a few, normalized.
        wanted: scores M×N×K that they give in turn.
    """
    shapes = [{name: tensor.shape for name, tensor in member.state_dict().items()} for member in members]
    if any(type(one) is not type(members[0]) or own != shapes[0] for one, own in zip(members, shapes, strict=True)):
        return "they are of different architectures"
    try:
        found = stacked_scores(members, image)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"vmap cannot run them as one ({str(error).strip().partition(chr(10))[0][:120]})"
    near = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    return "" if near else "they have the same weights' shapes, but compute differently"
