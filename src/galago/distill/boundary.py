"""BSS: boundary supporting samples, the teacher's opinion of images moved to its decision boundary.

Byeongho Heo, Minsik Lee, Sangdoo Yun, Jin Young Choi, "Knowledge Distillation with Adversarial Samples Supporting
Decision Boundary", AAAI 2019, arXiv:1805.05532.

Images that both networks classify correctly are pushed, by an attack on the teacher, just across the boundary to
another class. What the teacher says of images there tells the model where the boundary runs.

    L = a H(x) + b H(x'),   H = -Σ_c p_T(z^teacher)_c log p_T(z^student)_c, averaged over images, without T²
    a = 1 + 3 max(1 - e / E, 0),   b = 2 max(1 - (4/3) e / E, 0),   e of E epochs
    x' of the N_a base images with the largest Σ_{c≠y} (p^teacher_c - p^student_c)², towards a class k that is drawn
    from the teacher's probabilities of the classes other than y
    x' ← clamp(x' + η (g + 1e-4) ∇(z_k - z_y) / ‖∇‖_2),   g = z_y - z_k of the teacher, while it still says y

When: a teacher of another architecture, or few images. Until three quarters of the training are over, a step costs
`steps` passes of the teacher forward and backward and one of the model on N_a images, then no more than probabilities.

Usual setting (CIFAR-10, and the defaults): T = 3, N_a = 64, η = 0.3, at most 10 steps, clamped to ±2.5 (of normalized
images), weight 1; the task's own weight 1; 80 epochs, batch 256.

Recipe: recipes/distill/bss_resnet20_cifar10.yaml.

The model runs a second time in each step, in training mode: its BatchNorm sees the attacked images too, as in the
official code. The attack leaves no gradient in either network. Chosen here: e / E is the progress of the training,
which the official code knows by whole epochs. y is the class with the largest probability of the target, so that mixed
images have one too. Where fewer than N_a images are base images, others of the batch fill the pass up, unmoved, for
BatchNorm but not for the loss; without any the term is 0. So nothing waits for the accelerator and sizes stay the same.
An image where the gradient is zero is not moved.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from galago.distill.lesson import Lesson, Seen
from galago.errors import UserError
from galago.schedule import Schedule

BEYOND = 1e-4  # logits; so that the last step crosses the boundary and does not end on it


def weights_at(progress: float) -> tuple[float, float]:
    """a and b, of the batch's images and of the attacked ones.

    >>> weights_at(0.0), weights_at(0.75), weights_at(1.0)
    ((4.0, 2.0), (1.75, 0.0), (1.0, 0.0))
    """
    return 1 + 3 * max(1 - progress, 0.0), 2 * max(1 - 4 * progress / 3, 0.0)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`-Σ_c p_T(teacher)_c log p_T(student)_c` of each image, N; scores N×K, the teacher's taken as constant."""
    wanted = (teacher.detach() / temperature).softmax(1)
    return nn.functional.cross_entropy(student / temperature, wanted, reduction="none")


def base_images(student: Tensor, teacher: Tensor, label: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which images to attack: those that both classify correctly, most different in the other classes first.

    Args:
        student: scores N×K.
        teacher: scores N×K.
        label: y, N.
        count: N_a, at most N.

    Returns:
        `count` numbers of images, and for each whether it is one of these or only fills up.

    >>> right, wrong = [4.0, 0.0], [0.0, 4.0]
    >>> student, teacher = torch.tensor([right, wrong, right]), torch.tensor([right, right, [1.0, 0.0]])
    >>> base_images(student, teacher, torch.zeros(3, dtype=torch.long), 3)
    (tensor([2, 0, 1]), tensor([ True,  True, False]))
    """
    right = (student.argmax(1) == label) & (teacher.argmax(1) == label)
    apart = (teacher.softmax(1) - student.softmax(1)).square().scatter(1, label.unsqueeze(1), 0.0).sum(1)
    chosen = torch.where(right, apart, -1.0).topk(count).indices
    return chosen, right[chosen]


def draw_targets(teacher: Tensor, label: Tensor, uniform: Tensor) -> Tensor:
    """k, N: drawn from the teacher's probabilities of the classes other than the label's.

    Args:
        teacher: scores N×K.
        label: y, N.
        uniform: N numbers from [0, 1): the first of the other classes, likeliest first, whose sum reaches this share.

    >>> draw_targets(torch.tensor([[9.0, 1.0, 2.0]] * 2), torch.tensor([0, 0]), torch.tensor([0.7, 0.8]))
    tensor([2, 1])
    """
    probability, others = teacher.softmax(1).scatter(1, label.unsqueeze(1), -1.0).sort(1, descending=True)
    reached = probability[:, :-1].cumsum(1)  # the label's own is the last
    place = (reached < uniform.unsqueeze(1) * reached[:, -1:]).sum(1, keepdim=True)
    return others.gather(1, place).squeeze(1)


def step_across(images: Tensor, scores: Tensor, label: Tensor, target: Tensor, rate: float, limit: float) -> Tensor:
    """Images N×C×H×W, of which these are the scores, after one step towards the target class; clamped to ±limit."""
    gap = (scores.gather(1, target.unsqueeze(1)) - scores.gather(1, label.unsqueeze(1))).squeeze(1)
    (slope,) = torch.autograd.grad(gap.sum(), images)  # of the images alone: none is left in the network
    length = slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    further = images + rate * (BEYOND - gap).view(-1, 1, 1, 1) * slope / length
    return torch.where(length > 0, further.clamp(-limit, limit), images).detach()


class BoundarySamples(Lesson):
    """The teacher's softened probabilities, of the batch and of images moved to its decision boundary.

    Args:
        temperature: T, how much both distributions are softened.
        samples: N_a, images of each batch that are attacked at most.
        steps: of the attack at most.
        rate: η, how far a step goes for each logit between the two classes.
        limit: what a pixel of an attacked, normalized image may be, on both sides of 0.
        weight: of this loss, or a schedule of it, beside its own a and b.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        samples: int = 64,
        steps: int = 10,
        rate: float = 0.3,
        limit: float = 2.5,
        weight: float | Schedule = 1.0,
    ) -> None:
        super().__init__(weight)
        for name, value in (("temperature", temperature), ("rate", rate), ("limit", limit)):
            if value <= 0:
                raise UserError(f"BoundarySamples: {name} is {value}; give a positive number")
        if samples < 1 or steps < 1:
            raise UserError(f"BoundarySamples: samples {samples} and steps {steps} must be at least 1")
        self.temperature, self.samples, self.steps = temperature, samples, steps
        self.rate, self.limit = rate, limit

    def forward(self, seen: Seen) -> Tensor:
        of_batch, of_boundary = weights_at(seen.progress)
        loss = of_batch * soft_cross_entropy(seen.student.scores, seen.teacher.scores, self.temperature).mean()
        return loss + of_boundary * self.at_boundary(seen) if of_boundary > 0 else loss

    def at_boundary(self, seen: Seen) -> Tensor:
        """`H(x')`, a scalar."""
        label, (own, its) = seen.batch.target.argmax(1), (seen.student.scores, seen.teacher.scores)
        chosen, base = base_images(own, its, label, min(self.samples, len(label)))
        label = label[chosen]
        target = draw_targets(its[chosen], label, torch.rand(len(chosen), device=its.device, dtype=its.dtype))
        images = self.attack(seen.teacher.ask, seen.batch.input[chosen], label, target, base)
        with torch.no_grad():
            wanted = seen.teacher.ask(images)
        each = soft_cross_entropy(seen.student.ask(images), wanted, self.temperature)
        return (each * base).sum() / base.sum().clamp_min(1)

    def attack(
        self, ask: Callable[[Tensor], Tensor], images: Tensor, label: Tensor, target: Tensor, base: Tensor
    ) -> Tensor:
        """x', N×C×H×W: images moved until the network no longer says their label.

        Args:
            ask: gives the network's scores.
            images: x.
            label: y, N, what the network says now.
            target: k, N.
            base: N booleans; the other images stay as they are.
        """
        moved = images.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                scores = ask(moved.requires_grad_())
                further = step_across(moved, scores, label, target, self.rate, self.limit)
            moving = base & (scores.argmax(1) == label)
            moved = torch.where(moving.view(-1, 1, 1, 1), further, moved.detach())
        return moved
