"""OSKD: a network is its own teacher, by what it finds alike within each class.

Maria Tzelepi, Nikolaos Passalis, Anastasios Tefas, "Efficient Online Subclass Knowledge Distillation for Image
Classification", ICPR 2020; journal version: "Online Subclass Knowledge Distillation", Expert Systems with Applications
181, 2021 (no public code).

The image of its own class that is nearest in a batch is presumed to be of the same subclass (a Persian among cats). An
image learns the mean answer of both, and its embedding is drawn to that neighbor and kept away from the rest of the
class. One network, one stage, one pass.

    φ = embedding / its length,   D_ij = ‖φ_i - φ_j‖²,   S_i = {j ≠ i: y_j = y_i}
    N_i = the k nearest of S_i,   R_i = the rest of S_i,   m_i, r_i = the means of φ over N_i and R_i
    q_i = mean of softmax(z / T) over i and N_i
    L_soft = T² mean KL(q_i ‖ softmax(z_i / T))                              over images with S_i not empty
    L_embedding = mean ‖φ_i - m_i‖² + mean max(0, δ - ‖φ_i - r_i‖)²          the latter over R_i not empty
    δ = the median of ‖φ_i - φ_j‖ within classes;   q_i, m_i, r_i and δ are constants
    L = L_task + w (λ_s L_soft + λ_e L_embedding),   w rising (`galago.schedule.RampUp`)

When: there is no teacher, and classes are made of kinds. It costs distances within a batch. A batch must hold several
images of a class: (N - 1) / K of them on average; for 100 classes take large batches. Measure what it brings: on digits
of which only even and odd are told, neighbors did not become purer (`benchmarks/subclasses.py`), in a test on made-up
blobs they do.

Usual setting: the paper's values could not be had; the defaults are design choices (k = 1, T = 3, λ_s = 1, λ_e = 0.1,
a ramp over a tenth of the training, batches of 128 for ten classes).

List it in front of what branches the network (`FeatureFusion`, `NativeEnsemble`).

Recipe: recipes/distill/oskd_resnet20_cifar10.yaml.

Of the paper only the idea could be had: that neighbors within a class are the subclass is recalled, every formula is a
design choice. Chosen here: the embedding is what goes into the last linear layer; a feature map is averaged. An image
whose target is not certain has no one class, so it neither learns here nor is it a neighbor: mixed images, and all
images behind `LabelSmoothing`. Of equally distant images the first is nearer. An embedding of zeros stays zeros. In
distributed training neighbors are those of one process. A memory of earlier batches, of use where classes are many, is
left out: make batches large, or draw them class by class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.distill.adjust import shifted
from galago.distill.lesson import at, pooled
from galago.distill.teacher import scores
from galago.errors import UserError
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized
from galago.schedule import RampUp, Schedule
from galago.stages import resolved, stages
from galago.taps import CLASSIFIER, Taps


def unit(embedding: Tensor) -> Tensor:
    """Rows of length 1, N×d; rows of zeros stay zeros, and their gradient finite.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    squared = embedding.square().sum(1, keepdim=True)
    length = torch.where(squared > 0, squared, 1.0).sqrt()
    return embedding / length.clamp_min(1e-12)


def partners(target: Tensor) -> Tensor:
    """S: which other images are of an image's class, N×N; none for images whose class is not certain.

    Args:
        target: class probabilities N×K.

    >>> partners(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.9, 0.1]]))
    tensor([[False,  True, False],
            [ True, False, False],
            [False, False, False]])
    """
    certainty, label = target.float().max(1)
    certain = certainty > 1 - 1e-6
    same = (label[:, None] == label) & certain[:, None] & certain
    return same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)


def nearest(distance: Tensor, among: Tensor, k: int) -> Tensor:
    """N: the k nearest of each row, or all where there are fewer; N×N, as `among`."""
    order = distance.masked_fill(~among, math.inf).argsort(dim=1, stable=True)
    return torch.zeros_like(among).scatter(1, order[:, :k], True) & among


def mean_of(rows: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen rows for each image, zeros where none is. `rows` N×d, `chosen` N×N."""
    return chosen.to(rows.dtype) @ rows / chosen.sum(1, keepdim=True).clamp_min(1)


def median_distance(distance: Tensor, among: Tensor) -> Tensor:
    """δ: the median over the chosen pairs, of two middle ones their mean; 0 where there is no pair. A scalar."""
    return distance.masked_fill(~among, math.nan).nanquantile(0.5).nan_to_num(0.0)


def soft_labels(logits: Tensor, near: Tensor, temperature: float) -> Tensor:
    """q: the mean softened probabilities of each image and its neighbors, N×K."""
    p = (logits / temperature).softmax(1)
    return (p + near.to(p.dtype) @ p) / (near.sum(1, keepdim=True) + 1)


def soft_loss(logits: Tensor, q: Tensor, near: Tensor, temperature: float) -> Tensor:
    """`T² KL(q ‖ softmax(z / T))`, averaged over the images that have neighbors. A scalar."""
    log_p = (logits / temperature).log_softmax(1)
    return temperature**2 * average(nn.functional.kl_div(log_p, q, reduction="none").sum(1), near.any(1))


def pull_loss(phi: Tensor, near: Tensor) -> Tensor:
    """`‖φ - m‖²`, averaged over the images that have neighbors. A scalar."""
    return average((phi - mean_of(phi, near).detach()).square().sum(1), near.any(1))


def push_loss(phi: Tensor, rest: Tensor, delta: Tensor) -> Tensor:
    """`max(0, δ - ‖φ - r‖)²`, averaged over the images whose class has a rest. A scalar."""
    apart = (phi - mean_of(phi, rest).detach()).square().sum(1).clamp_min(1e-12).sqrt()
    return average((delta - apart).relu().square(), rest.any(1))


def average(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the values that count; 0 where none does."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


class SubclassDistillation(Method):
    """Each image learns the answer of the images of its class that are most like it.

    Args:
        neighbors: k, how many.
        temperature: T of the answers.
        soft: λ_s, weight of the answers' divergence.
        embedded: λ_e, weight of the distances of embeddings.
        weight: of both, or a schedule of it.
        layer: whose output is the embedding, by path or number of stage; what its classifier takes in by default.
        adjust: where an averaged answer's likeliest class is not the label, the two change places.
    """

    def __init__(
        self,
        neighbors: int = 1,
        temperature: float = 3.0,
        soft: float = 1.0,
        embedded: float = 0.1,
        weight: float | Schedule = RampUp(0.1),  # noqa: B008 - has no state
        layer: str | int = CLASSIFIER,
        adjust: bool = False,
    ) -> None:
        super().__init__()
        if neighbors < 1:
            raise UserError(f"SubclassDistillation: neighbors is {neighbors}; give 1 or more")
        if temperature <= 0:
            raise UserError(f"SubclassDistillation: temperature is {temperature}; give a positive number, usually 3")
        self.neighbors, self.temperature, self.soft, self.embedded = neighbors, temperature, soft, embedded
        self.weight, self.layer, self.adjust = weight, layer, adjust
        self._taps: Taps | None = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Changes nothing but adds a hook.

        Raises:
            UserError: there is no such layer, or none is named and the network has no linear one.
        """
        device = device_of(model)
        image = normalized(data, data.example()[:1], device)
        with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            found = stages(model, image) if isinstance(self.layer, int) else []
            self._taps = Taps(model, resolved([self.layer], found, "SubclassDistillation: the model"))
            model(image)
            self._taps.check("SubclassDistillation")
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        step = inner(batch)
        weight = at(self.weight, inner.progress)
        with torch.autocast(step.batch.input.device.type, enabled=False):
            soft, embedded = self.losses(
                scores(step.output), self.embedding()[: len(step.batch.target)], step.batch.target
            )
        return step.add(
            subclass_soft=weight * self.soft * soft,
            subclass_embedding=weight * self.embedded * embedded,
        )

    def embedding(self) -> Tensor:
        """What the layer gave last, N×d."""
        assert self._taps is not None, "prepare comes before the first step"
        (found,) = self._taps.values.values()
        return pooled(found.float())

    def losses(self, logits: Tensor, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """L_soft and L_embedding, two scalars, of scores N×K, embeddings N×d and class probabilities N×K."""
        phi, same = unit(embedding), partners(target)
        with torch.no_grad():
            distance = torch.cdist(phi, phi, compute_mode="donot_use_mm_for_euclid_dist")
            near = nearest(distance, same, self.neighbors)
            q = soft_labels(logits, near, self.temperature)
            q = shifted(q, target.argmax(1)) if self.adjust else q
            delta = median_distance(distance, same)
        soft = soft_loss(logits, q, near, self.temperature)
        return soft, pull_loss(phi, near) + push_loss(phi, same & ~near, delta)

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hook away."""
        if self._taps is not None:
            self._taps.remove(model)
        return model

    def summary(self) -> str | None:
        """Which embedding is compared."""
        if self._taps is None:
            return None
        return f"SubclassDistillation: the embedding is {self._taps.paths[0]!r}, {self.embedding().shape[1]} numbers"
