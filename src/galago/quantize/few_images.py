"""FewImages: distillation in two stages, for low bits with few images.

Yuan, Chen, Hu and Peng, "Towards Low-Bit Quantization of Deep Neural Networks with Limited Data", ICPR 2020 (no arXiv
id, no public code).

A quantized network learns from its own float self, on a handful of images without labels. First every block for
itself, each from what goes into it in float and what it gives then; so errors do not add up while blocks are still
poor. Then all blocks together, so that they make up for one another.

    independent   L_i = mean (B_i(X_i) - T_i)^2                 for each block i, X_i and T_i from the float network
    joint         L = a tau^2 KL(softmax(z_T / tau) || softmax(z / tau)) + b sum_i mean (F_i - T_i)^2 / mean T_i^2

When to use it: 3 to 8 bits where there are 10 to 1,000 images and rounding alone is not good enough, in a recipe with
`epochs: 0`, behind `Quantize`; with `GroupWiseWeight`, the paper's other half, or any quantizer whose range learns.
Weights learn too, so it goes further than choosing roundings (`AdaRound`, `BRECQ`) and can fit few images too closely:
never measure on them. It costs `iterations` training steps of every block, and as many of the network and its float
copy together.

Recipe: recipes/quantize/few_images_w4a4_resnet20_cifar10.yaml.

Of the paper only the abstract could be had, which fixes the two stages; losses, rates and lengths are design choices,
in the manner of block reconstruction and of distillation. BatchNorm keeps its statistics, which few images cannot give;
its factors and shifts learn as a weight and a bias would into which it had been folded. Images come with the data's own
augmentation; with more `batches` than an epoch has, each comes several times, augmented anew. A stage that would make
its own error on the calibration images larger is taken back. Where an output is a dict, its entry `main` is distilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.probe import device_of, normalized
from galago.quantize.reconstruction import (
    PASS,
    Errors,
    Features,
    Learned,
    error,
    float_copy,
    kept_if_better,
    learning,
    mending,
    minimize,
    scores,
    walk,
)
from galago.quantize.rounding import weight_quantized
from galago.quantize.units import Unit, units

JOINT_RATE = 0.1  # of the first stage's


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, averaged over images (and places). A scalar."""
    wanted, found = (z.div(temperature).log_softmax(1) for z in (teacher, student))
    return (wanted.exp() * (wanted - found)).sum(1).mean() * temperature**2


class FewImages(Method):
    """Distills the float network into the quantized one, block by block and then as a whole; list it behind `Quantize`.

    Args:
        iterations: of each stage: for every block, then for the network.
        images: calibrate on this many images of each class; none: on whole batches, whatever classes they hold.
        batches: training batches to calibrate on, where `images` is not given.
        independent: do the first stage.
        joint: do the second stage.
        sequential: in the first stage, a block learns on what the blocks before it, already quantized, give.
        batch_size: images an iteration.
        rate: Adam's in the first stage, of weights and ranges; a tenth of it in the second. Both fall to 0.
        temperature: tau.
        answers: weight of the divergence of answers in the second stage.
        features: weight of the blocks' errors in the second stage.
        labels: weight of the cross-entropy with the labels in the second stage.
    """

    done: Tensor

    def __init__(
        self,
        iterations: int = 1000,
        images: int | None = None,
        batches: int = 8,
        independent: bool = True,
        joint: bool = True,
        sequential: bool = False,
        batch_size: int = 32,
        rate: float = 1e-4,
        temperature: float = 4.0,
        answers: float = 1.0,
        features: float = 1.0,
        labels: float = 0.0,
    ) -> None:
        super().__init__()
        numbers = {"iterations": iterations, "images": images, "batches": batches, "batch_size": batch_size}
        for name, value in numbers.items():
            if value is not None and value < 1:
                raise UserError(f"FewImages: {name} is {value}, but must be at least 1")
        self.iterations, self.images, self.batches, self.batch_size = iterations, images, batches, batch_size
        self.independent, self.joint, self.sequential = independent, joint, sequential
        self.rate, self.temperature = rate, temperature
        self.answers, self.features, self.labels = answers, features, labels
        self.register_buffer("done", torch.zeros((), dtype=torch.bool))
        self._said = ""

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Does both stages, once: a resumed run has them in its weights."""
        weight_quantized(model)
        if self.done:
            return model
        with mending(model, data.seed):
            batch = calibration(data, self.images, self.batches, device_of(model))
            teacher, sequence = float_copy(model), units(model, batch.input[:1])
            if self.independent:
                self.learn_alone(model, teacher, sequence, batch.input, data.seed)
            if self.joint:
                self.learn_together(model, teacher, sequence, batch)
        self.done.fill_(True)
        return model

    def summary(self) -> str | None:
        """What was gained."""
        return self._said.strip() or None

    def learn_alone(
        self, model: nn.Module, teacher: nn.Module, sequence: Sequence[Unit], images: Tensor, seed: int
    ) -> dict[str, Errors]:
        """The first stage. Without `sequential` the order of the blocks does not matter.

        Returns:
            Errors of each block, by its path.
        """
        found = {}
        for unit, features in walk(model if self.sequential else teacher, teacher, sequence, images):
            torch.manual_seed(seed)
            found[unit.name] = self.learn_block(model, unit, features)
        gained = [after / before for before, after in found.values() if before > 0]
        share = sum(gained) / max(len(gained), 1)
        self._said += f"FewImages: {len(found)} blocks learned, their errors are {share:.2f} of what they were\n"
        return found

    def learn_block(self, model: nn.Module, unit: Unit, features: Features) -> Errors:
        """One block of the first stage."""
        parts = unit.parts(model)
        own = list(parts.parameters())

        def loss(picked: Tensor, iteration: int) -> Tensor:
            difference: Tensor = parts(features.given[picked]) - features.target[picked]
            return difference.float().square().mean()

        def learn() -> None:
            with learning(own):
                learned = [Learned(own, self.rate, cosine=True)]
                what = f"FewImages {unit.name}"
                minimize(loss, learned, len(features.given), self.batch_size, self.iterations, what)

        return kept_if_better(own, lambda: error(model, unit, features), learn)

    def learn_together(self, model: nn.Module, teacher: nn.Module, sequence: Sequence[Unit], batch: Batch) -> Errors:
        """The second stage.

        Returns:
            The divergence of answers on all calibration images.
        """
        own = list(model.parameters())

        def loss(picked: Tensor, iteration: int) -> Tensor:
            return self.joint_loss(model, teacher, sequence, Batch(batch.input[picked], batch.target[picked]))

        def learn() -> None:
            with learning(own):
                learned = [Learned(own, self.rate * JOINT_RATE, cosine=True)]
                minimize(loss, learned, len(batch.input), self.batch_size, self.iterations, "FewImages, all blocks")

        found = kept_if_better(own, lambda: self.divergence_on(model, teacher, batch.input), learn)
        self._said += (
            f"FewImages: divergence of answers {found.before:.4g} before the joint stage, {found.after:.4g} after"
        )
        return found

    def joint_loss(self, model: nn.Module, teacher: nn.Module, sequence: Sequence[Unit], batch: Batch) -> Tensor:
        """The second stage's loss of some images."""
        with torch.no_grad(), gathered(teacher, sequence) as wanted:
            target = scores(teacher(batch.input.clone()))
        with gathered(model, sequence) as found:
            answer = scores(model(batch.input.clone()))
        total = self.answers * divergence(answer, target, self.temperature)
        for one, other in zip(found, wanted, strict=True):
            size = other.float().square().mean().clamp_min(1e-12)
            total = total + self.features * (one.float() - other.float()).square().mean() / size
        if self.labels:
            total = total + self.labels * nn.functional.cross_entropy(answer, batch.target)
        return total

    @torch.no_grad()
    def divergence_on(self, model: nn.Module, teacher: nn.Module, images: Tensor) -> float:
        """How far the answers are from the float network's."""
        answers = [[scores(net(part.clone())) for part in torch.split(images, PASS)] for net in (model, teacher)]
        return float(divergence(torch.cat(answers[0]), torch.cat(answers[1]), self.temperature))


@contextmanager
def gathered(model: nn.Module, sequence: Sequence[Unit]) -> Iterator[list[Tensor]]:
    """What the units give, in the order of execution, as long as the `with` lasts."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        found.append(output)
        return output.clone()  # which what follows may change in place

    with ExitStack() as hooks:
        for unit in sequence:
            hooks.callback(model.get_submodule(unit.paths[-1]).register_forward_hook(keep).remove)
        yield found


def calibration(data: Data, images: int | None, batches: int, device: torch.device) -> Batch:
    """Normalized images and their targets as one batch.

    Args:
        data: where they come from.
        images: how many of each class; none: whole batches.
        batches: how many, over several epochs where one has fewer.
        device: where they go.

    Raises:
        UserError: there is no training batch.
    """
    epochs = chain.from_iterable(data.train(epoch) for epoch in count()) if len(data.train()) else iter(())
    given = few_of_each(data, images) if images is not None else list(islice(epochs, batches))
    if not given:
        raise UserError("the data give no training batch to calibrate on; make batch_size smaller")
    inputs = torch.cat([normalized(data, batch.input, device) for batch in given])
    return Batch(inputs, torch.cat([batch.target for batch in given]).to(device))


def few_of_each(data: Data, images: int) -> list[Batch]:
    """The first images of each class in the first epoch; of a class that has fewer, all."""
    missing, found = dict.fromkeys(range(len(data.classes)), images), []
    for batch in data.train():
        kept = []
        for position, label in enumerate(batch.target.argmax(1).tolist()):
            if missing[label] > 0:
                missing[label] -= 1
                kept.append(position)
        found.append(Batch(batch.input[kept], batch.target[kept]))
        if not any(missing.values()):
            break
    return [batch for batch in found if len(batch.input)]
