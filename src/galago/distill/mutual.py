"""DML: deep mutual learning, networks that train side by side and teach each other.

Ying Zhang, Tao Xiang, Timothy M. Hospedales, Huchuan Lu, "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384.

Several networks begin with different weights, see the same images, and each learns the labels and what the others make
of the images. No teacher has to be trained before, and each network is reported to become better than it does alone.

    L_i = CE(z_i, y) + 1 / (K - 1) Σ_{j≠i} KL(p(z_j) ‖ p(z_i)),   p = softmax, z_j taken as constant in L_i

When: no trained teacher is at hand. It costs the training of every peer, in time and in memory; the file that ships is
as small and as fast as without.

Usual setting (and the default): one peer of the same architecture, T = 1, both losses with weight 1.

Recipes: recipes/distill/dml_resnet20_cifar10.yaml, recipes/distill/dml_mixed_resnet20_cifar10.yaml (two architectures).

All networks are updated together, after one forward pass each (the paper's equations, the cheaper way). `sequential`
is the paper's algorithm: the model is updated first, then peer by peer, and each learns from what those before it say
of the batch after their updates. That costs one more forward pass for each network but the last, which BatchNorm's
running statistics see too. The log then has peers' losses as they were before any update, peers' gradients are not
clipped, methods listed behind this one see an update for each network (list it last), and training runs in one process.
The official repository sums the divergences without 1 / (K - 1), adds 1e-8 inside the logarithm and draws a new batch
for each update; here all learn from the same one.

Chosen here: peers see the batch as the model saw it, mixed images and smoothed labels included, and learn from the
task's own losses; what other methods change in the model (quantizers, say) or add to its loss concerns the model
alone. The model is what is measured and shipped: make the network that you want to ship the recipe's `model`. Peers
stay in the checkpoint. Where an output is a dict, its entry `main` counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from galago.batch import Batch, Step
from galago.data import Data
from galago.distill.teacher import scores
from galago.errors import UserError
from galago.layers import removing
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized


def mutual_divergence(said: Sequence[Tensor], learner: int) -> Tensor:
    """`1 / (K - 1) Σ_j KL(p(z_j) ‖ p(z_i))` for i the learner, a scalar.

    Args:
        said: scores z of each of the K networks, N×classes; all but the learner's are taken as constant.
        learner: i, which of them learns.

    >>> mutual_divergence([torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 3.0]])], 0)
    tensor(0.)
    """
    own = said[learner].log_softmax(1)
    others = [one.detach().log_softmax(1) for number, one in enumerate(said) if number != learner]
    parts = [nn.functional.kl_div(own, other, reduction="batchmean", log_target=True) for other in others]
    return torch.stack(parts).mean()


class Round(NamedTuple):
    """One batch that peers still have to learn from, each after the one before it has been updated."""

    batch: Batch
    losses: list[Tensor]  # the task's, of each peer
    said: list[Tensor]  # by the model and by each peer, with their graphs
    precision: torch.autocast

    @torch.no_grad()
    def ask_again(self, network: nn.Module, number: int) -> None:
        """Has a network, whose weights have changed, answer anew."""
        with self.precision:
            self.said[number] = scores(network(self.batch.input))


class MutualLearning(Method):
    """Trains further networks beside the model; each learns from the labels and from the others.

    Args:
        peers: networks for the same classes, of any architecture, not the model's weights; they are not shipped.
        sequential: update one network after the other, each seeing those before it updated, instead of all at once.
    """

    def __init__(self, peers: Sequence[nn.Module], sequential: bool = False) -> None:
        super().__init__()
        if not peers:
            raise UserError("MutualLearning: peers is empty; name at least one network to train beside the model")
        self.peers, self.sequential = nn.ModuleList(peers), sequential
        self._rounds: list[Round] = []

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing.

        Raises:
            UserError: networks tell different classes apart or begin with the same weights, or one update after the
                other is wanted in several processes.
        """
        if self.sequential and processes() > 1:
            raise UserError(
                "MutualLearning: sequential updates run in one process; set devices: 1 or sequential: false"
            )
        networks = [model, *self.peers.to(device_of(model))]
        require_same_classes(networks, normalized(data, data.example()[:1], device_of(model)))
        require_different_weights(networks)
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        beside = [Forward(peer, inner.task)(step.batch) for peer in self.peers]
        said = [scores(one.output) for one in (step, *beside)]
        step = step.add(mutual=mutual_divergence(said, 0))
        for number, one in enumerate(beside, start=1):
            losses = {**one.losses, "mutual": mutual_divergence(said, number)}
            kept = {name: loss.detach() if self.sequential else loss for name, loss in losses.items()}
            step = step.add(**{f"peer_{number}_{name}": loss for name, loss in kept.items()})
        if self.sequential:
            self._rounds.append(Round(step.batch, [one.loss for one in beside], said, precision_now(said[0])))
        return step

    def update(self, model: nn.Module, apply: Callable[[], None]) -> None:
        if self.sequential:
            self._take_turns([model, *self.peers], apply)
        else:
            apply()

    def _take_turns(self, networks: Sequence[nn.Module], apply: Callable[[], None]) -> None:
        """The model with the gradients that are there, then each peer with those of its own turn.

        An optimizer leaves parameters without a gradient as they are, so that a turn changes one network.
        """
        rounds, self._rounds = self._rounds, []
        with using_gradients_once():
            apply()
            for number in range(1, len(networks)):
                for one in rounds:
                    one.ask_again(networks[number - 1], number - 1)
                losses = [one.losses[number - 1] + mutual_divergence(one.said, number) for one in rounds]
                torch.autograd.backward(torch.stack(losses).mean())
                apply()


@contextmanager
def using_gradients_once() -> Iterator[None]:
    """Within this `with`, an optimizer that has made its step forgets the gradients that it made it with.

    Not only the model's and the peers': other methods' parameters, too, must not be moved again by a peer's turn.
    """

    def forget(optimizer: Optimizer, args: object, kwargs: object) -> None:
        optimizer.zero_grad()

    with removing([register_optimizer_step_post_hook(forget)]):
        yield


def processes() -> int:
    """How many train together."""
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if spread else 1


def precision_now(tensor: Tensor) -> torch.autocast:
    """The mixed precision that is in force for tensors like this one, to compute in it again later."""
    kind = tensor.device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def require_same_classes(networks: Sequence[nn.Module], image: Tensor) -> None:
    """Compares what the model and its peers make of one image.

    Raises:
        UserError: a peer tells other classes apart.
    """
    counts = []
    for network in networks:
        with evaluating(network), torch.no_grad():
            counts.append(scores(network(image)).shape[1])
    for number, count in enumerate(counts):
        if count != counts[0]:
            raise UserError(
                f"MutualLearning: peer {number} tells {count} classes apart, the model {counts[0]};"
                " give it the model's number of classes"
            )


def require_different_weights(networks: Sequence[nn.Module]) -> None:
    """Compares all networks, two by two.

    Raises:
        UserError: two are equal; on the same batches they would stay so, with nothing to teach each other.
    """
    names = ["the model", *(f"peer {number}" for number in range(1, len(networks)))]
    for (first, one), (second, other) in combinations(zip(names, networks, strict=True), 2):
        pairs = list(zip(one.parameters(), other.parameters(), strict=False))
        if pairs and all(torch.equal(a, b) for a, b in pairs):
            raise UserError(
                f"MutualLearning: {second} begins with the weights of {first}, so that neither has anything to teach"
                " the other; let each draw its own"
            )
