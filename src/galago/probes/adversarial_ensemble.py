"""Accuracy under several attacks, each on what the ones before it left, and whether gradients tell the truth.

Francesco Croce, Matthias Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020, arXiv:2003.01690. The signs of masked gradients: Athalye, Carlini, Wagner,
"Obfuscated Gradients Give a False Sense of Security", ICML 2018, arXiv:1802.00420 (recalled). The formulas are in
`galago.attack_ensemble`.

    autoattack_{norm}_{ε}_…
      clean_accuracy            on the same images, not attacked
      apgd_ce_accuracy          right all the way of APGD on the cross-entropy
      apgd_dlr_accuracy         … and of APGD on DLR
      apgd_targeted_accuracy    … and of APGD towards each of the likeliest wrong classes
      search_accuracy           right about all that the random search shows, which needs no gradient
      transfer_accuracy         right about an attack on another network, the one that `surrogate` names
      robust_accuracy           broken by none of these
      mean_gradient             mean |∂CE/∂pixel| on the clean images
      gradient_masking          1 where the loss is flat (mean gradient below 1e-8), or where the search or the
                                transferred attack breaks more images than all attacks by gradients

When: robustness is claimed. It is an upper bound on the true figure that is harder to fool than `Adversarial`, and
takes some 250 forward and backward and 500 forward passes over `images`. DLR needs three classes and its targeted form
four; with fewer these attacks are left out. The images are test images: choose nothing by these numbers.

Rounding has no useful gradient; that of a quantized network is a stand-in (straight through), and a network that only
seems robust because of it is not. Name the float run as `surrogate`, and believe `search_accuracy`, which an exported
file is measured by, too: a file has no gradients and is told the clean, search and transfer figures alone.

Usual setting: 8/255 in the maximum norm. Steps, targets and queries are a small setting (design choice: 50, 3 and 500);
the published one has 100 steps, 9 targets, 5000 queries and a further attack, FAB, which is not here.

Chosen here: a network that draws noise is attacked and judged by the mean of its probabilities over `draws` answers
(the official code averages gradients alike, over 20), for among single answers one would be wrong by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from galago.attack_ensemble import (
    Network,
    ScoreLoss,
    apgd,
    cross_entropy,
    dlr,
    look,
    square_search,
    targeted_dlr,
)
from galago.attacks import Ball, Linf, whole_levels
from galago.console import say
from galago.data import Data
from galago.errors import UserError
from galago.probe import Deployed, Probe, device_of, evaluating, has_gradients, spread
from galago.probes.adversarial import draws_noise
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.run import load, normalization_of
from galago.task import Task, scores_of

FLAT = 1e-8

Attack = Callable[[Tensor, Tensor], Tensor]  # raw images and N labels to N: right all the way


class AutoAttackLite(Probe):
    """Accuracy on test images that several attacks in a row try to break, as `autoattack_linf_0.0314_robust_accuracy`.

    Args:
        ball: how far the attacks may go; 8/255 in every pixel value by default.
        steps: of each APGD.
        targets: towards how many wrong classes APGD goes.
        queries: of the search, for each image.
        draws: answers of a stochastic network that are averaged.
        images: how many test images are attacked; 1000 for a claim.
        surrogate: folder of a finished run whose network is attacked in this one's place, besides: the float network.
    """

    def __init__(
        self,
        ball: Ball = Linf(8 / 255),  # noqa: B008 - has no state
        steps: int = 50,
        targets: int = 3,
        queries: int = 500,
        draws: int = 20,
        images: int = 100,
        surrogate: Path | None = None,
    ) -> None:
        counts = {"steps": steps, "targets": targets, "queries": queries, "draws": draws, "images": images}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"AutoAttackLite: {name} is {count}; give 1 or more")
        self.ball, self.steps, self.targets, self.queries = ball, steps, targets, queries
        self.draws, self.images, self.surrogate = draws, images, surrogate

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        device, classes = device_of(deployed), len(data.classes)
        batches = [(one.input.to(device), one.target.to(device)) for one in spread(data.test(), self.images)]
        with evaluating(deployed), torch.random.fork_rng([device] if device.type == "cuda" else []):
            draws = self.draws if draws_noise(deployed, batches[0][0][:2]) else 1
            network = asked(deployed, classes, draws)
            other = asked(self.other(task).to(device), classes, 1) if self.surrogate else None
            whitebox = has_gradients(deployed, batches[0][0][:2])
            torch.manual_seed(0)
            found = [self.judged(image, target.argmax(1), network, other, whitebox) for image, target in batches]
            numbers = {
                f"{name}_accuracy": float(torch.cat([f[name] for f in found]).double().mean()) for name in found[0]
            }
            if whitebox:
                numbers["mean_gradient"] = mean_gradient(network, batches)
                numbers["gradient_masking"] = self.masking(numbers, deployed)
        return {f"autoattack_{self.ball.name}_{name}": number for name, number in numbers.items()}

    def other(self, task: Task) -> Deployed:
        """The network of the run that `surrogate` names."""
        assert self.surrogate is not None
        network = load(self.surrogate)
        return Deployed(network, normalization_of(network), task).eval()

    def judged(
        self, image: Tensor, label: Tensor, network: Network, other: Network | None, whitebox: bool
    ) -> dict[str, Tensor]:
        """By the name of each attack, about which images the network is right in spite of it, N.

        Args:
            image: raw, N×C×H×W.
            label: N classes.
            network: what is attacked.
            other: what is attacked in its place, besides.
            whitebox: whether the network has gradients.
        """
        with torch.no_grad():
            clean = network(image).argmax(1) == label
        found, left = {"clean": clean}, clean
        for name, attack in self.by_gradient(network, image, label) if whitebox else ():
            left = survivors(left, attack, image, label)
            found[name] = left
        search = partial(square_search, network=network, ball=self.ball, queries=self.queries)
        found["search"] = survivors(clean, lambda image, label: search(image, label), image, label)
        if other is not None:
            found["transfer"] = survivors(clean, partial(self.transferred, network, other), image, label)
        if whitebox:
            found["robust"] = torch.stack(list(found.values())).all(0)
        return found

    def by_gradient(self, network: Network, image: Tensor, label: Tensor) -> Iterator[tuple[str, Attack]]:
        """Attacks for these images, in order."""
        with torch.no_grad():
            scores = network(image)
        classes = scores.shape[1]
        yield "apgd_ce", partial(self.right_under, network, cross_entropy)
        if classes >= 3:
            yield "apgd_dlr", partial(self.right_under, network, dlr)
        if classes >= 4:
            yield "apgd_targeted", partial(self.right_under_targeted, network)

    def right_under(self, network: Network, loss: ScoreLoss, image: Tensor, label: Tensor) -> Tensor:
        """About which images a network is right all the way of APGD, N."""
        center = image / 255
        return apgd(center, label, network, loss, self.ball, self.steps, self.ball.drawn_at_edge(center)).right

    def right_under_targeted(self, network: Network, image: Tensor, label: Tensor) -> Tensor:
        """The same, towards each of the wrong classes that the network holds likeliest, one after another."""
        with torch.no_grad():
            scores = network(image).scatter(1, label[:, None], -torch.inf)
        likeliest = scores.argsort(1, descending=True)[:, : min(self.targets, scores.shape[1] - 1)]
        right = torch.ones_like(label, dtype=torch.bool)
        for aim in likeliest.unbind(1):
            right = right & self.right_under(network, partial(targeted_dlr, aim=aim), image, label)
        return right

    def transferred(self, network: Network, other: Network, image: Tensor, label: Tensor) -> Tensor:
        """About which images a network is right when another is attacked in its place, N."""
        center = image / 255
        worst = apgd(center, label, other, cross_entropy, self.ball, self.steps, self.ball.drawn_at_edge(center))
        with torch.no_grad():
            return network(whole_levels(worst.image, image)).argmax(1) == label

    def masking(self, numbers: dict[str, float], deployed: nn.Module) -> float:
        """1 where gradients do not tell how easily the network is fooled, which is then said; else 0."""
        signs = masks(numbers)
        if signs:
            say(f"AutoAttackLite: gradient masking: {'; '.join(signs)}. The network is not as robust as it seems")
        rounds = any(isinstance(part, QuantLayer | QuantOutput) for part in deployed.modules())
        if rounds and self.surrogate is None:
            say(
                "AutoAttackLite: gradients go straight through the rounding of this network and are stand-ins;"
                " name the float run as surrogate, and measure the exported file too"
            )
        return float(bool(signs))


def masks(numbers: dict[str, float]) -> list[str]:
    """The signs of gradient masking, in words.

    Args:
        numbers: accuracies and the mean gradient, by name.

    >>> masks({"apgd_ce_accuracy": 0.5, "search_accuracy": 0.25, "mean_gradient": 0.1})
    ['the search without gradients breaks more (25.0 % survive) than all attacks by gradients (50.0 %)']
    """
    found = []
    if numbers["mean_gradient"] < FLAT:
        found.append(f"the loss is flat, its mean gradient is {numbers['mean_gradient']:.1e}")
    by_gradient = min(number for name, number in numbers.items() if name.startswith("apgd_"))
    for name, what in (("search", "search without gradients"), ("transfer", "attack on another network")):
        if (left := numbers.get(f"{name}_accuracy", 1.0)) < by_gradient:
            found.append(
                f"the {what} breaks more ({left:.1%} survive) than all attacks by gradients ({by_gradient:.1%})"
            )
    return [text.replace("%", " %") for text in found]


def asked(deployed: nn.Module, classes: int, draws: int) -> Network:
    """A network from images, raw or in [0, 1], to scores of the data's classes; the log of its mean answer.

    Args:
        deployed: in evaluation mode.
        classes: how many; a score beyond them, such as that of abstaining, does not count.
        draws: answers that are averaged.
    """

    def scores(image: Tensor) -> Tensor:
        answers = [scores_of(deployed(image))[:, :classes] for _ in range(draws)]
        return answers[0] if draws == 1 else torch.stack([one.log_softmax(1) for one in answers]).logsumexp(0)

    return scores


def survivors(left: Tensor, attack: Attack, image: Tensor, label: Tensor) -> Tensor:
    """Which of the images that are left an attack does not break, N; the others are not attacked."""
    found = left.clone()
    if left.any():
        found[left] = attack(image[left], label[left])
    return found


def mean_gradient(network: Network, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Mean absolute gradient of each image's cross-entropy, over all pixels of all images."""
    slopes = [look(image / 255, target.argmax(1), network, cross_entropy).slope for image, target in batches]
    return float(torch.cat(slopes).abs().mean())
