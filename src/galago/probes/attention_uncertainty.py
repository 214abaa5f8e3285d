"""Bayesian ABN: two branches asked several times with dropout on, and the one that is less unsure answers.

Takuya Tsukahara, Tsubasa Hirakawa, Takayoshi Yamashita, Hironobu Fujiyoshi, "Improving Reliability of Attention Branch
Network by Introducing Uncertainty", ICPR 2020.

`galago.models.attention_branch` with dropout makes N passes behind its cut; the trunk, in which nothing is dropped,
runs once. For the branches h = a (attention) and p (perception), with the formulas of `galago.draws`,

    p̄_h = (1/N) Σ_n softmax(z_h^(n))        U_h = H(p̄_h), or the mutual information, or the winner's variance
    h* = argmin_h U_h, p on ties            ŷ = argmax p̄_{h*},  confidence max p̄_{h*},  uncertainty U_{h*}

It gives the accuracy of each branch (`branch_accuracy_attention`, `branch_accuracy_perception`), of a choice that is
always right where a branch is (`branch_accuracy_oracle`), of the choice by H (`branch_accuracy_selected`), by the
mutual information (`…_by_epistemic`) and by the winner's variance (`…_by_variance`); of the choice by H `branch_nll`,
`branch_ece`, `branch_aurc` (images ranked by U), mean `branch_uncertainty` and its epistemic part `branch_epistemic`,
and how often perception was chosen (`branch_share_perception`).

When: for a network with an attention branch, to see what asking N times and choosing is worth before building it into a
product: it costs N times what lies behind the cut, and no exported file does it. Such a file makes one pass, in which
nothing is dropped, and gives no numbers here. Without dropout all passes would be equal, and one is made.

Usual setting: dropout 0.2, N = 20 (design choices; the paper's are unknown).

Recipe: recipes/regularize/bayesian_attention_branch_resnet20_cifar10.yaml.

Chosen here, what was read being the abstract: everything but that the less uncertain branch answers. H compares two
branches fairly only if both are about equally well calibrated: `scaled: true` divides the scores of each by a
temperature of its own first, fitted to its single passes over the validation images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from galago.data import Data, Loader
from galago.draws import dropouts, entropy, epistemic, log_mean_probability, own_draws, winner_variance
from galago.errors import UserError
from galago.layers import find, removing, tap
from galago.models.attention_branch import MAP, Attended, attended_in
from galago.probe import Probe, device_of, evaluating
from galago.probes.selective import area, risks
from galago.reliability import answers, negative_log_likelihood, reliability, require_finite
from galago.task import Task
from galago.temperature import fit_temperature

BINS = 15


class Passes(NamedTuple):
    """What n passes with dropout say of N images."""

    main: Tensor  # z_p, n×N×K
    attention: Tensor  # z_a, n×N×K
    maps: Tensor  # A, n×N×h×w; its mean and standard deviation over the passes are what to show


class Decision(NamedTuple):
    """What the less uncertain branch says of N images."""

    perception: Tensor  # whether it was this branch, N
    probabilities: Tensor  # p̄ of the branch, N×K
    uncertainty: Tensor  # U of the branch, N
    epistemic: Tensor  # its mutual information, N


def decide(main: Tensor, attention: Tensor, measure: Callable[[Tensor], Tensor] = entropy) -> Decision:
    """Chooses a branch for each image.

    Args:
        main: scores n×N×K of the perception branch.
        attention: likewise of the attention branch.
        measure: U, N numbers of n×N×K.

    >>> decide(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])).perception
    tensor([True])
    """
    perception = measure(main) <= measure(attention)
    scores = torch.where(perception[:, None], main, attention)
    return Decision(perception, log_mean_probability(scores).exp(), measure(scores), epistemic(scores))


@torch.no_grad()
def ask(deployed: nn.Module, images: Tensor, passes: int) -> Passes:
    """Both branches' scores and maps of several passes with dropout on from the cut, before which all runs once.

    Args:
        deployed: holds an `AttentionBranch`.
        images: that it takes in.
        passes: n.

    Raises:
        UserError: it has no attention branch.
    """
    path = attended_in(deployed)
    if path is None:
        raise UserError("this network has no attention branch to ask; build it with galago.models.attention_branch")
    attended = find(deployed, path)
    assert isinstance(attended, Attended)

    def begin(module: nn.Module, inputs: tuple[Tensor]) -> None:
        for part in dropouts(deployed):
            part.train()

    hooks = removing([attended.register_forward_pre_hook(begin)])
    with evaluating(deployed), hooks, tap(deployed, f"{path}.{MAP}") as seen, attended.asked(passes):
        output = deployed(images)
    found = (one.unflatten(0, (passes, -1)) for one in (output["main"], output["attention"], seen.value))
    main, attention, maps = found
    return Passes(main, attention, maps.squeeze(2))


class AttentionUncertainty(Probe):
    """What a choice between the branches of an attention branch network is worth, on the test images.

    Args:
        passes: N.
        scaled: divide each branch's scores by a temperature of its own, from the validation images.
    """

    def __init__(self, passes: int = 20, scaled: bool = False) -> None:
        if passes < 1:
            raise UserError(f"AttentionUncertainty: passes is {passes}; give 1 or more, usually 20")
        self.passes, self.scaled = passes, scaled

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        if attended_in(deployed) is None:
            return {}
        passes = self.passes if dropouts(deployed) else 1
        with own_draws(deployed):
            main, attention, target = asked_about(deployed, data.test(), passes)
            if self.scaled:
                *held, truth = asked_about(deployed, data.validation(), passes)
                truth = truth.repeat(passes, 1)
                main, attention = (
                    z / fit_temperature(own.flatten(0, 1), truth)
                    for z, own in zip((main, attention), held, strict=True)
                )
        return numbers(main, attention, target.argmax(1))


def asked_about(deployed: nn.Module, batches: Loader, passes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores n×N×K of perception and attention in float64, and targets N×K, of all images."""
    device, found = device_of(deployed), []
    for batch in batches:
        said = ask(deployed, batch.input.to(device), passes)
        found.append((said.main.double().cpu(), said.attention.double().cpu(), batch.target))
    main, attention, target = zip(*found, strict=True)
    return torch.cat(main, 1), torch.cat(attention, 1), torch.cat(target)


def numbers(main: Tensor, attention: Tensor, label: Tensor) -> dict[str, float]:
    """The probe's numbers, of scores n×N×K and labels N."""
    for scores in (main, attention):
        require_finite(scores.flatten(0, 1))
    chosen = decide(main, attention)
    right = {name: log_mean_probability(s).argmax(1) == label for name, s in (("p", main), ("a", attention))}
    confidence, correct = answers(chosen.probabilities, label)
    others = [decide(main, attention, measure).probabilities.argmax(1) for measure in (epistemic, winner_variance)]
    return {
        "branch_accuracy_attention": share(right["a"]),
        "branch_accuracy_perception": share(right["p"]),
        "branch_accuracy_oracle": share(right["a"] | right["p"]),
        "branch_accuracy_selected": share(correct),
        "branch_accuracy_selected_by_epistemic": share(others[0] == label),
        "branch_accuracy_selected_by_variance": share(others[1] == label),
        "branch_share_perception": share(chosen.perception),
        "branch_uncertainty": float(chosen.uncertainty.mean()),
        "branch_epistemic": float(chosen.epistemic.mean()),
        "branch_nll": negative_log_likelihood(chosen.probabilities, label),
        "branch_ece": reliability(confidence, correct, BINS).expected_error(),
        "branch_aurc": area(risks(chosen.uncertainty, correct)),
    }


def share(true: Tensor) -> float:
    """The share of a boolean tensor that is true."""
    return float(true.double().mean())
