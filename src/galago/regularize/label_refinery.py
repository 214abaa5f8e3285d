"""SLR, stochastic label refinery: labels become what networks that never saw an image say of it.

Xi Fang, Jiancheng Yang, Bingbing Ni, "Stochastic Label Refinery: Toward Better Target Label Distribution", ICPR 2020
(no public code found).

The training set is divided into folds; for each, a fresh network learns from all other images and predicts the fold's.
Each image's target moves towards what was predicted, a new division follows, and in the end the model learns from the
refined targets of all images.

    for round r = 1 … R, for fold v = 1 … V:   a network learns q^(r-1) of the images outside v;
                                               p̂_i = softmax(z_i / T) is what it says of image i in v
    anchored:  q_i^(r) = (1 - ρ_r) onehot(y_i) + ρ_r p̂_i          (the label stays the likeliest for ρ_r < 1/2)
    free:      q_i^(r) = (1 - ρ_r) q_i^(r-1)   + ρ_r p̂_i          (labels that are wrong may be given up)
    L = - mean Σ_k q_ik log p_k

When: labels are doubtful (grades, noise) and training is cheap: it costs R V short trainings before the first epoch,
in usual setting four times the training itself. `galago.regularize.label_refinery_online` saves them. List it before
whatever mixes or smooths labels, since it looks targets up by the image's number. Compare with a smoothed label of the
same entropy.

Usual setting, the defaults: V = 5, R = 2, ρ = 0.3 and 0.45 (free: 0.4), the temperature of p̂ 1, and half as many
epochs as in the recipe. Reported in the abstract: diabetic retinopathy grading (`galago.tasks.ordinal`), quadratic
weighted kappa 0.8247 → 0.8348. Recipe: recipes/regularize/slr_noise_resnet20_cifar10.yaml.

Only the abstract of the paper could be had. It says that models learn current targets on stochastic splits and that
predictions of what was left out update the targets; all forms and numbers are chosen here:

- Folds hold equal shares of each class. A network of a fold is the recipe's model as it is built, in float, with fresh
  weights: one that had seen the left-out images, in an earlier round too, would only repeat their labels.
- Sub-trainings: SGD with momentum 0.9, half a cosine, cross-entropy with the targets as they are; batches as the data
  give them, less the images of the fold. Predictions are means over `views` epochs of augmented images, in evaluation
  mode: data offer training images as training shows them. An image that no batch showed keeps its target.
- Everything is drawn from the run's seed and leaves no trace in the random state: at ρ = 0 training is bit for bit
  training without it. The targets are in the checkpoint; before there is one, a run that is stopped refines anew, to
  the same numbers on the same machine. In one process only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import SGD

from galago.batch import Batch, Step
from galago.checkpoint import keep_random_state
from galago.console import say, watched
from galago.data import Data
from galago.errors import UserError
from galago.layers import innermost
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized
from galago.regularize.refined_targets import RefinedTargets, refined
from galago.schedule import Cosine
from galago.spec import build, describe, packages
from galago.task import scores_of

MOMENTUM, DECAY = 0.9, 5e-4  # of the sub-trainings


def fold_numbers(labels: Tensor, folds: int, generator: torch.Generator) -> Tensor:
    """A fold for each of N images, drawn at random; every class is spread evenly over all folds.

    >>> fold_numbers(torch.zeros(4, dtype=torch.long), 2, torch.Generator()).sort().values
    tensor([0, 0, 1, 1])
    """
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    numbers = torch.empty_like(labels)
    numbers[by_class] = torch.arange(len(labels)) % folds
    return numbers


def entropy(target: Tensor) -> Tensor:
    """Of class probabilities N×K, in nats. N.

    >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
    tensor([0.6931, 0.0000])
    """
    found: Tensor = torch.special.entr(target).sum(1)
    return found


class LabelRefinery(Method):
    """Refines all targets before training begins.

    Args:
        epochs: of each sub-training; half of the recipe's are usual.
        shares: ρ of each round, how far targets move towards predictions; 0.3 and 0.45, or 0.4 twice if `free`.
        folds: V, into how many parts the training set is divided.
        free: move from the last round's targets rather than from the labels.
        temperature: T, which divides the scores of predictions.
        rate: learning rate of the sub-trainings.
        views: epochs of augmented images over which predictions are averaged.
    """

    _data: Data

    def __init__(
        self,
        epochs: int = 15,
        shares: Sequence[float] | None = None,
        folds: int = 5,
        free: bool = False,
        temperature: float = 1.0,
        rate: float = 0.1,
        views: int = 2,
    ) -> None:
        super().__init__()
        usual = (0.4, 0.4) if free else (0.3, 0.45)
        self.shares = list(usual if shares is None else shares)
        self.epochs, self.folds, self.free, self.temperature = epochs, folds, free, temperature
        self.rate, self.views = rate, views
        self.kept = RefinedTargets("LabelRefinery")
        if min(epochs, views) < 1 or folds < 2 or temperature <= 0 or rate <= 0:
            raise UserError(
                f"LabelRefinery: epochs {epochs} and views {views} are at least 1, folds {folds} at least 2,"
                f" temperature {temperature:g} and rate {rate:g} above 0"
            )
        if not all(0 <= share <= 1 for share in self.shares):
            raise UserError(f"LabelRefinery: shares are {self.shares}; give numbers from 0 to 1")

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Only looks whether targets can be kept.

        Raises:
            UserError: the data do not say how many images there are, or several processes train.
        """
        self._data = data
        self.kept.empty(data, torch.device("cpu"))
        self.kept.to(device_of(model))
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        """Refines before the first epoch, unless a checkpoint has brought the targets back."""
        if self.kept.rows is None:
            with keep_random_state(), torch.compiler.set_stance("force_eager"):
                self.kept.rows = self.refine(model, self._data)
        return model

    def summary(self) -> str:
        """What it will cost."""
        count = len(self.shares) * self.folds
        return f"LabelRefinery: {count} trainings of {self.epochs} epochs come before the first epoch"

    def step(self, batch: Batch, inner: Forward) -> Step:
        return inner(self.kept.looked_up(batch))

    def refine(self, model: nn.Module, data: Data) -> Tensor:
        """All rounds, one after another. The targets, images×K."""
        labels = self.labels(data, device_of(model))
        targets = labels.clone()
        for number, share in enumerate(self.shares):
            predicted = self.predicted(model, data, targets, self.divided(labels, data.seed, number), number)
            told = predicted.sum(1, keepdim=True) > 0
            targets = refined(targets if self.free else labels, torch.where(told, predicted, targets), share)
            say(f"label refinery {number + 1}/{len(self.shares)}: {changed(labels, targets)}")
        return targets

    def labels(self, data: Data, device: torch.device) -> Tensor:
        """What the data give, images×K; zeros for images that no batch of the first two epochs showed."""
        labels = self.kept.empty(data, device)
        for batch in shown(data, 2):
            labels[self.kept.numbers(batch).to(device)] = batch.target.to(device)
        return labels

    def divided(self, labels: Tensor, seed: int, number: int) -> Tensor:
        """The fold of each image in a round; -1 where the label is not known."""
        known = (labels.sum(1) > 0).cpu()
        numbers = torch.full((len(labels),), -1)
        generator = torch.Generator().manual_seed(1000 * seed + 100 * number)
        numbers[known] = fold_numbers(labels.cpu()[known].argmax(1), self.folds, generator)
        return numbers.to(labels.device)

    def predicted(self, model: nn.Module, data: Data, targets: Tensor, folds: Tensor, number: int) -> Tensor:
        """p̂ of every image by a network that did not see it in this round, images×K; zeros where no batch showed it."""
        found = torch.zeros_like(targets)
        for fold in watched(range(self.folds), f"refining labels, round {number + 1}", self.folds):
            torch.manual_seed(1000 * data.seed + 100 * number + fold + 1)
            network = fresh(model)
            self.learn(network, data, targets, (folds >= 0) & (folds != fold))
            found += self.asked(network, data, targets, folds == fold)
        return found / found.sum(1, keepdim=True).clamp_min(1e-12)

    def learn(self, network: nn.Module, data: Data, targets: Tensor, seen: Tensor) -> None:
        """A short training on the images that are `seen`."""
        optimizer = SGD(network.parameters(), self.rate, MOMENTUM, weight_decay=DECAY, nesterov=True)
        cosine, device = Cosine(), targets.device
        network.train()
        for epoch in range(self.epochs):
            batches = data.train(epoch)
            for number, batch in enumerate(batches):
                optimizer.param_groups[0]["lr"] = self.rate * cosine((epoch + number / len(batches)) / self.epochs)
                index = batch.extra["index"].to(device)
                kept = seen[index]
                if int(kept.sum()) < 2:  # BatchNorm has nothing to learn from one
                    continue
                output = network(normalized(data, batch.input, device)[kept])
                loss = nn.functional.cross_entropy(scores_of(output), targets[index[kept]])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()

    @torch.no_grad()
    def asked(self, network: nn.Module, data: Data, targets: Tensor, left_out: Tensor) -> Tensor:
        """The sum of a network's answers on images that were left out, images×K; zeros for all others."""
        answers = torch.zeros_like(targets)
        with evaluating(network):
            for batch in shown(data, self.views):
                index = batch.extra["index"].to(targets.device)
                asked = left_out[index]
                if not asked.any():
                    continue
                scores = scores_of(network(normalized(data, batch.input, targets.device)[asked]))
                answers.index_add_(0, index[asked], (scores / self.temperature).softmax(1))
        return answers


def changed(labels: Tensor, targets: Tensor) -> str:
    """What refining has done so far, for a person to read."""
    known = labels.sum(1) > 0
    other = (targets.argmax(1) != labels.argmax(1))[known].float().mean()
    return f"mean entropy of targets {entropy(targets[known]).mean():.3f}, another class likeliest in {other:.1%}"


def fresh(model: nn.Module) -> nn.Module:
    """A network like the model before any method changed it, with weights of its own, on the same device."""
    record = describe(innermost(model))
    network = build(record, allow=packages(record))
    assert isinstance(network, nn.Module)
    return network.to(device_of(model))


def shown(data: Data, epochs: int) -> Iterator[Batch]:
    """The training batches of the first epochs."""
    return chain.from_iterable(data.train(epoch) for epoch in range(epochs))
