"""Auxiliary heads: every further head of a network learns the task, too.

Christian Szegedy, Wei Liu, Yangqing Jia, Pierre Sermanet, Scott Reed, Dragomir Anguelov, Dumitru Erhan, Vincent
Vanhoucke, Andrew Rabinovich, "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842, section 5.

A network that gives named outputs is judged by `main`. Each other output of class scores adds the same losses, so that
layers far from the answer get a gradient of their own.

    L = L_task(z_main, y) + w Σ_h L_task(z_h, y)

When: a network with heads beside its answer, such as `galago.models.attention_branch`, whose branch learns nothing of
the labels without it. It costs no forward pass.

Usual setting: w = 1 for an attention branch (Fukui et al., CVPR 2019, arXiv:1812.10025); 0.3 for the two classifiers
of the paper above.

Recipe: recipes/regularize/attention_branch_resnet20_cifar10.yaml.

Chosen here: the task decides what a loss is, so that a mixed or smoothed target is every head's target. A network
without further heads trains as without this method.
"""

from __future__ import annotations

from galago.batch import Batch, Step
from galago.errors import UserError
from galago.method import Forward, Method


class AuxiliaryHeads(Method):
    """Adds the task's losses of every output beside `main`, as `{loss}_{output}`.

    Args:
        weight: of these losses.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"AuxiliaryHeads: weight is {weight:g}; give 0 or more, usually 1")
        self.weight = weight

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        heads = step.output if isinstance(step.output, dict) else {}
        for name, scores in heads.items():
            if name != "main" and self.weight:
                losses = inner.task.losses(scores, step.batch)
                step = step.add(**{f"{loss}_{name}": self.weight * value for loss, value in losses.items()})
        return step
