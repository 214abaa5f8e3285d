"""NAS-KD: a search for the student's architecture that the teacher guides.

Zhexi Zhang, Wei Zhu, Junchi Yan, Peng Gao, Guotong Xie, "Automatic Student Network Search for Knowledge Distillation",
ICPR 2020. It follows DARTS (Liu, Simonyan, Yang, ICLR 2019).

Students are usually smaller copies of their teacher. Here all operations of a search space compete in one network
(`galago.search.super_network`), whose weights and whose choice among the operations both learn from the
distillation loss; the likeliest choice is the student, which is then trained from scratch with the same loss.

    w = softmax((a + g) / τ),   edge(x) = Σ_o w_o o(x),   h = Σ_i softmax(d)_i h_{L_i}       (`search.relaxation`)
    L = γ CE + (1 - γ) T² KL(p_T(teacher) ‖ p_T(student)) + μ E[cost(a, d)]
    in turns:   a, d ← Adam on L of one half of the training images,   weights ← the recipe's optimizer, other half

The loss is that of the methods listed behind this one: `galago.distill.distill.Distill` with `SoftTargets`,
`task_weight` 0.2 and weight 0.8 for γ = 0.2. Two recipes make a student: the search, and a training whose model is
`galago.search.student.student`. The same search serves texts (a BERT as teacher, `galago.models.bert`) and images.

When: no good small architecture is known for the task. A step costs as much as one of all operations together, some
twenty times a student's. Set the student beside one drawn at random and a hand-made one of equal size
(`benchmarks/nas_kd.py`): a random one is often as good.

Usual setting: unknown (only the abstract could be had). Here T = 4, γ = 0.2, μ 0, 0.1 or 1, cells of 4 nodes, 2, 4 or 6
of them, 20 epochs of search (a and d: Adam at 3e-4, decay 1e-3; weights: SGD at 0.025, cosine), then 50 epochs.

Recipe: recipes/nas_kd/search.yaml, then recipes/nas_kd/student.yaml; on images recipes/nas_kd/search_cifar10.yaml. The
paper's seven tasks and its results could not be had; its abstract is about BERT, nothing about images is its claim.

Chosen here: all formulas (the abstract has none), among them first-order updates as in DARTS. τ falls geometrically.
Which half an image belongs to is drawn once by the run's seed and kept; a batch is divided by it, and its two parts are
the two updates of a step, that of a and d first. List this method first, or images of both halves may be mixed. The
cost counts parameters of the convolutions on the edges (multiply-accumulates differ by a factor only), in all cells:
the expected number of cells counts too. BatchNorm's statistics follow both halves. Losses in the log are those of the
weights' half; `cost` there is μ E[cost]. The finished model is the derived network with the weights of the search, a
first look; nothing is fine-tuned. No probes of the teacher's layers, and no stop when identities prevail. One process.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.console import say
from galago.data import Data
from galago.errors import UserError
from galago.method import Forward, Method
from galago.quantize.layer import QuantLayer
from galago.search.cell_network import CellNetwork
from galago.search.space import OPERATIONS
from galago.search.super_network import SuperNetwork


class NasKd(Method):
    """Searches for a student in a super-network; list it first, and what teaches behind it.

    Args:
        mu: μ, weight of the expected cost; the larger, the smaller the student.
        rate: learning rate of the choice, by Adam.
        decay: weight decay of the choice.
        temperature: τ at the beginning.
        last_temperature: τ at the end.
        hard: one operation an edge is drawn in training, instead of a mixture of all.
    """

    first_half: Tensor

    def __init__(
        self,
        mu: float = 0.1,
        rate: float = 3e-4,
        decay: float = 1e-3,
        temperature: float = 1.0,
        last_temperature: float = 0.1,
        hard: bool = False,
    ) -> None:
        super().__init__()
        if mu < 0 or rate <= 0 or decay < 0:
            raise UserError(f"NasKd: mu {mu:g} and decay {decay:g} must be 0 or more, rate {rate:g} above 0")
        if not 0 < last_temperature <= temperature:
            raise UserError(
                f"NasKd: temperature falls from {temperature:g} to {last_temperature:g}; give a larger and a smaller"
                " number above 0, usually 1 and 0.1"
            )
        self.mu, self.rate, self.decay, self.hard = mu, rate, decay, hard
        self.temperature, self.last_temperature = temperature, last_temperature
        self._optimizer: torch.optim.Adam | None = None
        self._saved: dict[str, Any] = {}
        self._about = ""

    def get_extra_state(self) -> dict[str, Any]:
        return self._saved if self._optimizer is None else self._optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._saved = state
        if self._optimizer is not None and state:
            self._optimizer.load_state_dict(state)

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing; divides the training images.

        Raises:
            UserError: the model is no super-network or quantized, the data do not say how many images there are, or
                training is to run in several processes.
        """
        network = searched(model)
        if data.images is None or data.images < 2:
            raise UserError("NasKd: these data do not say how many images there are to divide; set their `images`")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UserError("NasKd: a search runs in one process; set devices: 1")
        network.hard = self.hard
        self._optimizer = torch.optim.Adam([network.a, network.d], self.rate, (0.5, 0.999), weight_decay=self.decay)
        self.set_extra_state(self._saved)
        self.register_buffer("first_half", halves(data.images, data.seed).to(network.a.device), persistent=False)
        self._about = about(network)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        if "index" not in batch.extra:
            raise UserError("NasKd: batches do not say which images they hold; let these data give `extra['index']`")
        network, first = searched(inner.model), self.first_half[batch.extra["index"]]
        tau = self.temperature * (self.last_temperature / self.temperature) ** inner.progress
        if first.any():
            network.draw(tau)
            self._choose(network, part(batch, first), inner)
        network.draw(tau)
        if first.all():  # nothing for the weights to learn from: very small batches only
            step = inner(batch)
            return step._replace(losses={name: 0.0 * loss for name, loss in step.losses.items()})
        return inner(part(batch, ~first)).add(cost=self.mu * network.expected_cost())

    def _choose(self, network: SuperNetwork, batch: Batch, inner: Forward) -> None:
        """Moves a and d, and nothing else."""
        assert self._optimizer is not None, "prepare comes first"
        choice = [network.a, network.d]
        for tensor in choice:
            tensor.requires_grad_(True)
        loss = inner(batch).loss + self.mu * network.expected_cost()
        for tensor, slope in zip(choice, torch.autograd.grad(loss, choice), strict=True):
            tensor.requires_grad_(False)
            tensor.grad = slope
        self._optimizer.step()
        self._optimizer.zero_grad()

    def finish(self, model: nn.Module) -> nn.Module:
        """The derived network, with the weights of the search."""
        found = searched(model).derived().train(model.training)
        say(f"NAS-KD: {described(found)}")
        return found

    def summary(self) -> str | None:
        """What is searched."""
        return self._about or None


def halves(images: int, seed: int) -> Tensor:
    """Whether each image is one of those that the choice learns from: exactly half of them, drawn once.

    >>> int(halves(10, 0).sum())
    5
    """
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order < images // 2


def part(batch: Batch, chosen: Tensor) -> Batch:
    """Some of a batch's images, with all that belongs to them.

    Args:
        batch: N images.
        chosen: N booleans.
    """
    extra = {name: value[chosen] for name, value in batch.extra.items()}
    return Batch(batch.input[chosen], batch.target[chosen], extra)


def searched(model: nn.Module) -> SuperNetwork:
    """The model as what it has to be.

    Raises:
        UserError: it is not.
    """
    if not isinstance(model, SuperNetwork):
        raise UserError(
            f"NasKd searches in a super-network, not in a {type(model).__name__}: make the recipe's model a"
            " galago.search.super_network.SuperNetwork, and list what wraps it in the student's recipe"
        )
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise UserError("NasKd searches in float: leave Quantize out here and quantize the student in a second run")
    return model


def about(network: SuperNetwork) -> str:
    """What is searched, for a person to read."""
    size = sum(parameter.numel() for parameter in network.parameters())
    return (
        f"NasKd: {len(network.a)} edges of {len(OPERATIONS)} operations in each cell, {network.depths} cells,"
        f" {size:,} parameters compete"
    )


def described(found: CellNetwork) -> str:
    """A derived network, for a person to read."""
    size = sum(parameter.numel() for parameter in found.parameters())
    counts = Counter(operation.name for _, _, operation in found.genotype)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"{found.depth} cells of {kinds}; {size:,} parameters"
