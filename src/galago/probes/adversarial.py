"""Accuracy under attack: how often a network is right when images are changed to fool it.

FGSM (Goodfellow et al., ICLR 2015, arXiv:1412.6572), PGD (Madry et al., ICLR 2018, arXiv:1706.06083), and the gradient
averaged over draws (Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018,
arXiv:1802.00420); all recalled. The formulas are in `galago.attacks`.

    {norm}_{ε}_clean_accuracy      on the same images, not attacked
    {norm}_{ε}_fgsm_accuracy       one step to the edge of the ball
    {norm}_{ε}_pgd_accuracy        many steps from a random start, the worst of several starts
    {norm}_{ε}_transfer_accuracy   PGD on another network, the one that `surrogate` names

When to use it: whenever robustness is claimed, with ε, steps and starts beside the number. It costs draws · steps ·
starts forward and backward passes over `images` after each epoch. A network that gives the same answer twice needs one
draw and gets one. A transfer attack that does more harm than PGD, or an accuracy that stays up where ε is 1, says that
gradients are of no use and the network is not robust. The images are test images: choose nothing by these numbers.

A file has no gradients, nor has an integer module: there the accuracy on clean and transferred images is all that is
told. Transferred images are whole levels of 0 to 255, as files take them, rounded towards the image they come from.

Design choices: ε is that of [0, 1], before normalization; each accuracy is that of one answer as the network ships it;
of several starts the one with the highest mean loss counts for an image, not any that fools it once, which among noisy
answers would be chance. Images are spread evenly over the set.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from galago.attacks import Ball, Linf, Loss, against, fgsm, pgd, whole_levels, worst
from galago.data import Data
from galago.errors import UserError
from galago.probe import Deployed, Probe, device_of, evaluating, has_gradients, spread
from galago.run import load, normalization_of
from galago.task import Task, scores_of

Attack = Callable[[Tensor, Tensor], Tensor]  # raw images (uint8) and targets N×K to what the network is shown


class Adversarial(Probe):
    """Accuracy on test images that are attacked, as `linf_0.0314_pgd_accuracy`.

    Args:
        ball: how far the attack may go; 8/255 in every pixel value by default.
        step_size: of PGD; a quarter of the ball's radius by default.
        steps: of PGD.
        restarts: from how many random images PGD starts.
        draws: of a stochastic network's noise that each gradient is averaged over.
        images: how many test images are attacked.
        surrogate: folder of a finished run whose network is attacked in this one's place, besides.
    """

    def __init__(
        self,
        ball: Ball = Linf(8 / 255),  # noqa: B008 - has no state
        step_size: float | None = None,
        steps: int = 10,
        restarts: int = 1,
        draws: int = 10,
        images: int = 256,
        surrogate: Path | None = None,
    ) -> None:
        if step_size is not None and step_size <= 0:
            raise UserError(f"Adversarial: step_size is {step_size:g}; give a positive length, such as 0.01")
        for name, count in {"steps": steps, "restarts": restarts, "draws": draws, "images": images}.items():
            if count < 1:
                raise UserError(f"Adversarial: {name} is {count}; give 1 or more")
        self.ball, self.step_size, self.steps, self.restarts = ball, step_size, steps, restarts
        self.draws, self.images, self.surrogate = draws, images, surrogate

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        device = device_of(deployed)
        found = spread(data.test(), self.images)
        images, targets = torch.cat([batch.input for batch in found]), torch.cat([batch.target for batch in found])
        batches = list(zip(torch.split(images, data.batch_size), torch.split(targets, data.batch_size), strict=True))
        with evaluating(deployed), torch.random.fork_rng([device] if device.type == "cuda" else []):
            attacks = self.attacks(deployed, task, images[:2].to(device))
            return {
                f"{self.ball.name}_{name}_accuracy": accuracy(deployed, task, attack, batches)
                for name, attack in attacks.items()
            }

    def attacks(self, deployed: nn.Module, task: Task, image: Tensor) -> dict[str, Attack]:
        """What this network can be attacked by.

        Args:
            deployed: in evaluation mode.
            task: of the network.
            image: a few raw images.
        """
        found: dict[str, Attack] = {"clean": lambda image, target: image}
        if has_gradients(deployed, image):
            draws = self.draws if draws_noise(deployed, image) else 1
            found["fgsm"] = lambda image, target: fgsm(image / 255, against(deployed, target), self.ball, draws)
            found["pgd"] = lambda image, target: self.pgd(image / 255, against(deployed, target), draws)
        if self.surrogate is not None:
            network = load(self.surrogate)
            other = Deployed(network, normalization_of(network), task).to(image.device)
            found["transfer"] = lambda image, target: whole_levels(
                self.pgd(image / 255, against(other, target), draws=1), image
            )
        return found

    def pgd(self, image: Tensor, loss: Loss, draws: int) -> Tensor:
        """PGD from several starts, the worst for each image. N×C×H×W, pixels in [0, 1]."""
        step = self.ball.epsilon / 4 if self.step_size is None else self.step_size
        found = [
            pgd(image, loss, self.ball, step, self.steps, draws, self.ball.drawn(image)) for _ in range(self.restarts)
        ]
        return found[0] if self.restarts == 1 else worst(found, loss, draws)


@torch.no_grad()
def draws_noise(deployed: nn.Module, image: Tensor) -> bool:
    """Whether a network gives another answer when it is asked again."""
    return not torch.equal(*(scores_of(deployed(image)) for _ in range(2)))


def accuracy(deployed: nn.Module, task: Task, attack: Attack, batches: list[tuple[Tensor, Tensor]]) -> float:
    """How often a network is right about attacked images.

    Args:
        deployed: in evaluation mode.
        task: says what it decides.
        attack: what is done to the images.
        batches: raw images and class probabilities N×K.
    """
    device, right, seen = device_of(deployed), 0, 0
    torch.manual_seed(0)  # for each attack, so that one does not depend on which others there are
    for image, target in [(image.to(device), target.to(device)) for image, target in batches]:
        attacked = attack(image, target)
        with torch.no_grad():
            decided = task.decisions(deployed(attacked))
        right += int((decided == target.argmax(1)).sum())
        seen += len(image)
    return right / seen
