"""Small stand-ins to try the laws on: images, a network, a training; and what it means to be the same."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from galago.batch import Batch, Step
from galago.checkpoint import random_state, set_random_state
from galago.data import Data, Normalize
from galago.method import Method
from galago.task import Task
from galago.trainer import Learner, follow, new_optimizer, prepare

CLASSES = 3


class TinyImages(Data):
    """Forty-eight colored 8×8 images of three classes, made up on the spot: a class is the brightest channel.

    Args:
        batch_size: images a batch.
    """

    classes, images = ("red", "green", "blue"), 48

    def __init__(self, batch_size: int = 8) -> None:
        self.batch_size = batch_size
        self.normalize = Normalize([0.5, 0.5, 0.5], [0.25, 0.25, 0.25])

    def train(self, epoch: int = 0, start: int = 0) -> list[Batch]:
        return self._batches(epoch)[start:]

    def validation(self) -> list[Batch]:
        return self._batches(-1)

    def example(self) -> Tensor:
        image: Tensor = self.validation()[0].input[:1]
        return image

    def _batches(self, epoch: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch + 1)
        label = torch.arange(48) % CLASSES
        target = nn.functional.one_hot(label, CLASSES).float()
        noise = torch.randint(0, 150, (48, 3, 8, 8), generator=generator)
        image = (noise + 80 * target.view(48, CLASSES, 1, 1)).to(torch.uint8)
        starts = range(0, 48, self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return [Batch(image[part], target[part], {"index": torch.arange(48)[part]}) for part in parts]


def tiny_network() -> nn.Module:
    """Two convolutions of odd widths with BatchNorm, and a linear layer: 3×8×8 images to three scores."""
    from galago.models.tiny import Tiny

    return Tiny(classes=CLASSES, channels=3, width=5)


def classify() -> Task:
    """Classification into three classes."""
    from galago.tasks.classify import Classify

    return Classify(CLASSES)


def require(condition: object, law: str) -> None:
    """Raises an `AssertionError` with the law's sentence unless the condition holds."""
    if not condition:
        raise AssertionError(f"broken law: {law}")


def identical(first: Any, second: Any) -> bool:
    """Whether two trees of tensors and plain data agree bit for bit."""
    one, two = tree_leaves(first), tree_leaves(second)
    return len(one) == len(two) and all(
        (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and a == b
        for a, b in zip(one, two, strict=True)
    )


def clone(tree: Any) -> Any:
    """A tree of tensors and plain data whose tensors are copies."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)


def close(first: Any, second: Any, relative: float = 1e-5) -> bool:
    """Whether two trees of float tensors differ by no more than a share of their largest value."""
    one, two = tree_leaves(first), tree_leaves(second)
    return len(one) == len(two) and all(
        a.shape == b.shape and bool((a - b).abs().max() <= relative * a.abs().max().clamp_min(1e-3))
        for a, b in zip(one, two, strict=True)
    )


def exported(network: nn.Module, given: Any) -> Any:
    """What the network answers after `torch.export`."""
    try:
        return torch.export.export(network, (given,)).module()(given)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AssertionError(f"broken law: torch.export takes {type(network).__name__}, but {reason}") from error


class Trial:
    """A small training, step by step, as the trainer does it but for devices and files.

    Args:
        make_model: from normalized images to raw output; called first, from the same random state in every trial.
        task: judges outputs.
        data: images.
        make_methods: called next.
        saved: what `save` gave, to go on from there.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        task: Task,
        data: Data,
        make_methods: Callable[[], list[Method]],
        saved: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(0)
        model = make_model()
        self.data, self.batches = data, list(data.train())
        self.learner = Learner(model, task, make_methods(), data.normalize)
        prepare(self.learner, data, saved)
        factory = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        self.optimizer = new_optimizer(self.learner, factory)
        if saved is None:
            for method in self.learner.ideas:
                self.learner.model = method.epoch(self.learner.model, 0)
            self.optimizer = follow(self.learner, self.optimizer, factory)
        else:
            try:
                self.learner.load_state_dict(saved["learner"])
                self.optimizer.load_state_dict(saved["optimizer"])
            except (RuntimeError, ValueError) as error:
                raise AssertionError(f"broken law: `prepare` rebuilds the structure on resume, but {error}") from error
            set_random_state(saved["random"])

    def step(self, number: int) -> Step:
        """One training step on batch `number`."""
        self.learner.train()
        self.optimizer.zero_grad()
        step: Step = self.learner(self.batches[number], progress=number / len(self.batches))
        torch.autograd.backward(step.loss)
        apply: Callable[[], None] = self.optimizer.step
        for method in reversed(self.learner.ideas):
            apply = partial(method.update, self.learner.model, apply)
        apply()
        return step

    def save(self) -> dict[str, Any]:
        """A checkpoint, written and read again without pickle."""
        state = {
            "learner": self.learner.state_dict(),
            "methods": self.learner.methods.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        try:
            saved: dict[str, Any] = torch.load(file, weights_only=True)
        except UnpicklingError as error:
            raise AssertionError("broken law: what is saved is tensors and plain data, nothing else") from error
        return saved

    def image(self) -> Tensor:
        """Two normalized images."""
        image: Tensor = self.data.normalize(self.batches[0].input[:2])
        return image
