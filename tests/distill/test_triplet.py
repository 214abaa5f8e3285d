"""The triplet loss across two networks, against brute force and what must be true of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.augment.occlude import LowerHalf, Occlude, Occluded, Part, occluded
from galago.batch import Batch
from galago.data import Data
from galago.datasets.digits import Digits
from galago.distill.distill import Distill
from galago.distill.lesson import Seen, View
from galago.distill.logits import SoftTargets
from galago.distill.triplet import (
    All,
    BatchHard,
    CrossTriplet,
    Mining,
    Random,
    SemiHard,
    Triplets,
    random_of,
    semihard_negative,
    squared_distances,
    triplet_loss,
    unit,
)
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported
from galago.method import Forward, Method
from galago.models.joined import joined
from galago.models.tiny import Tiny
from galago.probe import Deployed, TaskMetrics
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.schedule import Cosine
from galago.taps import CLASSIFIER, Taps
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.trainer import Learner, finish, prepare
from lessons import equal

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "distillation" / "occluded_face_triplet_kd.npz")
COUNT, CLASSES = 9, 3


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


class Given(Mining):
    """Triplets that somebody else chose, one for each anchor."""

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        self.positive, self.negative = positive, negative

    def __call__(self, to_teacher: Tensor, to_model: Tensor, same: Tensor) -> Triplets:
        return Triplets(torch.arange(len(same)), self.positive, self.negative, torch.ones(len(same), dtype=torch.bool))


def told(mining: Mining, own: Tensor, its: Tensor, label: Tensor, margin: float = 0.2) -> Tensor:
    """The lesson's loss."""
    target = nn.functional.one_hot(label).double()
    lesson = CrossTriplet(margin, mining)
    return lesson(Seen(View(target, [own]), View(target, [its]), Batch(own, target), 0.0))


def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """Of the model and of the teacher, and labels."""
    label = torch.arange(COUNT) % CLASSES
    return torch.randn(COUNT, 4).double(), torch.randn(COUNT, 4).double(), label


def distance(first: Tensor, second: Tensor) -> float:
    return float(((first / first.norm() - second / second.norm()) ** 2).sum())


def brute_force(own: Tensor, its: Tensor, triplets: list[tuple[int, int, int]], margin: float = 0.2) -> float:
    """The formula, triplet by triplet."""
    terms = [max(0.0, distance(own[i], its[j]) - distance(own[i], own[k]) + margin) for i, j, k in triplets]
    return sum(terms) / len(terms)


def test_given_triplets_have_the_reference_loss_and_gradient() -> None:
    own = golden("student_embedding").clone().requires_grad_()
    mining = Given(golden("positive"), golden("negative"))
    loss = told(mining, own, golden("teacher_embedding"), golden("y"), float(golden("margin")))
    loss.backward()
    equal(loss, golden("loss_given"))
    equal(own.grad, golden("grad_given"))


@pytest.mark.parametrize(("mining", "name"), [(BatchHard(), "batch_hard"), (All(), "all")])
def test_mined_triplets_have_the_reference_loss_and_gradient(mining: Mining, name: str) -> None:
    own = golden("student_embedding").clone().requires_grad_()
    loss = told(mining, own, golden("teacher_embedding"), golden("y"))
    loss.backward()
    equal(loss, golden(f"loss_{name}"))
    equal(own.grad, golden(f"grad_{name}"))


def golden_distances() -> tuple[Tensor, Tensor, Tensor]:
    own, its = unit(golden("student_embedding")), unit(golden("teacher_embedding"))
    label = golden("y")
    return squared_distances(own, its), squared_distances(own, own), label.unsqueeze(1) == label


def test_the_hardest_of_a_batch_are_the_reference_ones() -> None:
    chosen = BatchHard()(*golden_distances())
    assert torch.equal(chosen.positive, golden("hard_positive"))
    assert torch.equal(chosen.negative, golden("hard_negative"))


def test_semihard_negatives_are_the_reference_ones() -> None:
    to_teacher, to_model, same = golden_distances()
    to_positive = to_teacher[torch.arange(len(same)), golden("positive")]
    negative = semihard_negative(to_positive, to_model, ~same)
    assert torch.equal(negative, golden("semihard_negative"))
    own = golden("student_embedding").clone().requires_grad_()
    loss = told(Given(golden("positive"), negative), own, golden("teacher_embedding"), golden("y"))
    loss.backward()
    equal(loss, golden("loss_semihard"))
    equal(own.grad, golden("grad_semihard"))


def test_all_is_the_mean_over_every_triplet() -> None:
    own, its, label = embeddings()
    every = [t for t in product(range(COUNT), repeat=3) if label[t[0]] == label[t[1]] and label[t[0]] != label[t[2]]]
    assert told(All(), own, its, label).item() == pytest.approx(brute_force(own, its, every))


def test_batch_hard_is_the_farthest_positive_and_the_closest_negative() -> None:
    own, its, label = embeddings()
    chosen = []
    for i in range(COUNT):
        positive = max((j for j in range(COUNT) if label[j] == label[i]), key=lambda j: distance(own[i], its[j]))
        negative = min((k for k in range(COUNT) if label[k] != label[i]), key=lambda k: distance(own[i], own[k]))
        chosen.append((i, positive, negative))
    assert told(BatchHard(), own, its, label).item() == pytest.approx(brute_force(own, its, chosen))


def test_semihard_is_the_closest_negative_beyond_a_random_positive_or_else_the_farthest() -> None:
    beyond, without = 0, 0
    for _ in range(20):
        own, its, label = embeddings()
        own_unit, its_unit = unit(own), unit(its)
        distances = squared_distances(own_unit, its_unit), squared_distances(own_unit, own_unit)
        chosen = SemiHard()(*distances, label.unsqueeze(1) == label)
        for i, j, k in zip(*(tensor.tolist() for tensor in chosen[:3]), strict=True):
            assert label[i] == label[j]
            others = [k for k in range(COUNT) if label[k] != label[i]]
            farther = [k for k in others if distance(own[i], own[k]) > distance(own[i], its[j])]
            beyond, without = beyond + bool(farther), without + (not farther)
            wanted = min if farther else max
            assert k == wanted(farther or others, key=lambda k: distance(own[i], own[k]))
    assert beyond
    assert without


def test_random_triplets_are_all_possible_and_equally_likely() -> None:
    label = torch.tensor([0, 0, 0, 1, 1])
    same, nothing = label.unsqueeze(1) == label, torch.zeros(5, 5)
    drawn = [Random()(nothing, nothing, same) for _ in range(600)]
    for name, allowed in (("positive", same), ("negative", ~same)):
        count = torch.stack([nn.functional.one_hot(getattr(one, name), 5) for one in drawn]).sum(0) / 600
        expected = allowed / allowed.sum(1, keepdim=True)
        assert (count - expected).abs().max() < 0.08
        assert not count[~allowed].any()


def test_random_numbers_are_the_seeds() -> None:
    allowed = torch.ones(6, 6, dtype=torch.bool)
    torch.manual_seed(3)
    first = random_of(allowed)
    torch.manual_seed(3)
    assert torch.equal(first, random_of(allowed))
    assert not torch.equal(first, random_of(allowed))


RULES = pytest.mark.parametrize("mining", [Random(), SemiHard(), BatchHard(), All()], ids=lambda m: type(m).__name__)


@RULES
def test_the_loss_is_never_negative_and_the_margin_when_all_coincide(mining: Mining) -> None:
    own, its, label = embeddings()
    assert told(mining, own, its, label) >= 0
    one = torch.ones(COUNT, 4).double()
    assert told(mining, one, one, label, 0.35).item() == pytest.approx(0.35)


@RULES
def test_the_loss_is_nothing_when_every_positive_is_closer_by_the_margin(mining: Mining) -> None:
    label = torch.arange(COUNT) % CLASSES
    apart = torch.eye(4).double()[label].requires_grad_()  # positives at distance 0, negatives at 2
    loss = told(mining, apart, apart.detach(), label, 2.0)
    loss.backward()
    assert loss == 0
    assert not apart.grad.any()


@RULES
def test_a_batch_of_one_class_gives_nothing_and_trains_on(mining: Mining) -> None:
    own = torch.randn(4, 3).double().requires_grad_()
    loss = told(mining, own, torch.randn(4, 3).double(), torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert not own.grad.any()


def test_anchors_without_a_negative_do_not_count_and_terms_of_zero_do() -> None:
    to_teacher, to_model = torch.zeros(3, 3), torch.full((3, 3), 1.0)
    place = torch.arange(3)
    chosen = Triplets(place, place, place, torch.tensor([True, True, False]))
    assert triplet_loss(to_teacher + torch.tensor([[1.0], [0.0], [9.0]]), to_model, chosen, 0.5) == 0.25


def test_gradients_pass_through_anchors_and_negatives_and_not_through_positives() -> None:
    own, its, label = (tensor.clone() for tensor in embeddings())
    own.requires_grad_()
    its.requires_grad_()
    mining = Given(torch.tensor([3]).repeat(COUNT), torch.tensor([1]).repeat(COUNT))
    told(mining, own, its, label, 9.0).backward()
    assert its.grad is None
    assert own.grad[1].any()
    assert own.grad[0].any()


def test_an_embedding_of_zeros_has_a_finite_gradient() -> None:
    own, its, label = embeddings()
    own[0] = 0
    own.requires_grad_()
    told(All(), own, its, label).backward()
    assert own.grad.isfinite().all()


def test_a_mixed_target_counts_as_its_most_likely_class() -> None:
    own, its, label = embeddings()
    mixed = 0.6 * nn.functional.one_hot(label).double() + 0.4 / CLASSES
    lesson = CrossTriplet(mining=All())
    assert lesson(Seen(View(mixed, [own]), View(mixed, [its]), Batch(own, mixed), 0.0)) == told(All(), own, its, label)


def test_maps_are_embedded_by_their_mean() -> None:
    own, its, label = embeddings()
    around = torch.randn(COUNT, 4, 2, 1).double()
    maps = own.view(COUNT, 4, 1, 1) + torch.cat([around, -around], 3)
    torch.testing.assert_close(told(All(), maps, its, label), told(All(), own, its, label))


class Head(nn.Module):
    """Pools in a function: no layer gives what the classifier takes in."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Watched(CrossTriplet):
    """Remembers what it was given."""

    def forward(self, seen: Seen) -> Tensor:
        self.told = seen
        return super().forward(seen)


def given() -> Batch:
    return Batch(torch.randn(6, 3, 8, 8), torch.eye(CLASSES)[torch.arange(6) % CLASSES])


def test_embeddings_are_what_the_classifier_takes_in_and_teach_all_below_it() -> None:
    model, teacher, lesson = Head(), Head(), Watched()
    method = Distill(teacher, [lesson])
    method.prepare(model, TinyImages())
    batch = given()
    step = method.step(batch, Forward(model, classify()))
    torch.testing.assert_close(lesson.told.student.features[0], model.body(batch.input).mean((2, 3)))
    torch.testing.assert_close(lesson.told.teacher.features[0], teacher.body(batch.input).mean((2, 3)))
    step.losses["watched"].backward()
    assert model.body.weight.grad.any()
    assert model.head.weight.grad is None
    assert teacher.body.weight.grad is None
    assert "input of the classifier" in [str(cell) for cell in method.summary().columns[1].cells]
    method.finish(model)
    assert not any(module._forward_hooks for module in [*model.modules(), *teacher.modules()])


def test_a_compiled_network_gives_the_embedding_of_this_batch() -> None:
    model = Head().eval()
    taps = Taps(model, [CLASSIFIER])
    model(given().input)
    taps.check("the model")
    compiled = torch.compile(model, backend="eager")
    for image in (given().input, given().input):
        compiled(image)
        torch.testing.assert_close(taps.values[CLASSIFIER], model.body(image).mean((2, 3)))


def test_another_layer_may_be_named() -> None:
    model, lesson = Head(), Watched(layers=["body"])
    method = Distill(Head(), [lesson])
    method.prepare(model, TinyImages())
    method.step(given(), Forward(model, classify()))
    assert lesson.told.student.features[0].shape == (6, 5, 6, 6)


def test_the_teacher_sees_the_whole_image_and_the_model_the_half() -> None:
    model, teacher, data = tiny_network(), tiny_network(), TinyImages()
    occlude, distill = Occlude(LowerHalf()), Distill(teacher, [CrossTriplet(), SoftTargets()], view="full")
    for method in (occlude, distill):
        method.prepare(model, data)
    saw: dict[str, list[Tensor]] = {"model": [], "teacher": []}
    for name, network in (("model", model), ("teacher", teacher)):
        network.register_forward_pre_hook(lambda module, inputs, name=name: saw[name].append(inputs[0]))
    raw = data.train()[0]
    batch = raw._replace(input=data.normalize(raw.input))
    occlude.step(batch, Forward(model, classify(), [distill]))
    (half,), (whole,) = saw["model"], saw["teacher"]
    assert torch.equal(whole, batch.input)
    assert torch.equal(half, occluded(batch.input, LowerHalf(), data.normalize(torch.zeros(3, 1, 1))))
    assert not torch.equal(half, whole)


@pytest.mark.parametrize("first", [True, False])
def test_the_view_is_found_wherever_it_is_kept(first: bool) -> None:
    methods = [Occlude(LowerHalf()), Distill(tiny_network(), [CrossTriplet()], view="full")]
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: methods if first else methods[::-1])
    assert trial.step(0).losses["cross_triplet"].isfinite()


def test_without_occlusion_a_model_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    network, data = tiny_network().eval(), TinyImages()
    occlude, distill = Occlude(Part()), Distill(network, [SoftTargets()], view="full")
    for method in (occlude, distill):
        method.prepare(network, data)
    step = occlude.step(given(), Forward(network, classify(), [distill]))
    assert step.losses["soft_targets"].abs() < 1e-6


def test_two_views_and_their_weights_are_the_reference_loss() -> None:
    mix, temperature = float(golden("kd_lambda")), float(golden("kd_T"))
    own = golden("kd_z_student").clone().requires_grad_()
    target = nn.functional.one_hot(golden("kd_y"), 4).double()
    lesson = SoftTargets(temperature)
    kd = lesson(Seen(View(own, []), View(golden("kd_z_teacher"), []), Batch(own, target), 0.0))
    loss = (1 - mix) * nn.functional.cross_entropy(own, target) + mix * kd
    loss.backward()
    equal(loss, golden("kd_loss"))
    equal(own.grad, golden("kd_grad"))


def test_a_view_that_nothing_keeps_is_named() -> None:
    model = tiny_network()
    method = Distill(tiny_network(), [SoftTargets()], view="full")
    method.prepare(model, TinyImages())
    with pytest.raises(UserError, match="view is 'full', but a batch keeps nothing"):
        method.step(given(), Forward(model, classify()))


def test_it_obeys_the_laws() -> None:
    for mining in (Random(), SemiHard(), BatchHard(), All()):
        check_method(lambda mining=mining: Distill(tiny_network(), [CrossTriplet(mining=mining)], 0.5))


def test_it_trains_a_quantized_network_with_mixed_and_hidden_images_that_exports() -> None:
    def methods() -> list[nn.Module]:
        distill = Distill(tiny_network(), [CrossTriplet()], view="full")
        return [Quantize(LSQWeight(4), LSQ(4)), CutMix(probability=1.0), Occlude(LowerHalf()), distill]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    losses = [trial.step(number).losses["cross_triplet"] for number in range(2)]
    assert all(loss.isfinite() for loss in losses)
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def trained(model: nn.Module, data: Data, methods: Sequence[Method], seed: int, rate: float, epochs: int) -> nn.Module:
    """A copy of the model, trained for a few seconds."""
    torch.manual_seed(seed)
    data.seed = seed
    learner = Learner(copy.deepcopy(model), Classify(10), methods, data.normalize)
    prepare(learner, data, None)
    learner.train()
    wanted = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=rate, momentum=0.9, weight_decay=5e-4)
    steps = epochs * len(data.train())
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: Cosine()(step / steps))
    for batch in (batch for epoch in range(epochs) for batch in data.train(epoch)):
        optimizer.zero_grad()
        learner(batch).loss.backward()
        optimizer.step()
        falling.step()
    return finish(learner)


def accuracies_on_half_digits(seed: int) -> list[float]:
    """In percent: of the teacher, the fine-tuned student, KD, the triplet loss, and both students joined."""
    half, task = Occluded(Digits(), LowerHalf()), Classify(10)
    groups = Occluded(Digits(together=8), LowerHalf())
    torch.manual_seed(seed)
    teacher = trained(Tiny(width=8), Digits(), [], seed, 0.1, 6)
    student = trained(teacher, half, [Occlude()], seed, 0.02, 3)
    kd = Distill(copy.deepcopy(teacher), [SoftTargets(weight=0.7)], 0.3, "full")
    triplet = Distill(copy.deepcopy(teacher), [CrossTriplet()], view="full")
    first = trained(student, half, [Occlude(), kd], seed, 0.02, 3)
    second = trained(student, groups, [Occlude(), triplet], seed, 0.02, 3)
    both = trained(joined([copy.deepcopy(first), copy.deepcopy(second)], 10), half, [Occlude()], seed, 1.0, 3)
    models = (teacher, student, first, second, both)
    found = [TaskMetrics()(Deployed(model, half.normalize, task), task, half) for model in models]
    return [100 * numbers["accuracy"] for numbers in found]


def test_on_half_digits_each_step_of_the_paper_is_as_good_as_the_one_before() -> None:
    found = torch.tensor([accuracies_on_half_digits(seed) for seed in range(2)]).mean(0).tolist()
    teacher, student, kd, triplet, both = found
    assert teacher < student - 20
    assert student <= min(kd, triplet) + 0.5
    assert max(kd, triplet) <= both + 0.5


def test_networks_of_different_width_are_refused_before_training() -> None:
    with pytest.raises(UserError, match="the model's embedding has 5 numbers, the teacher's 7"):
        Distill(Head(7), [CrossTriplet()]).prepare(Head(), TinyImages())


def test_a_network_without_a_linear_layer_is_refused_before_training() -> None:
    model = nn.Sequential(nn.Conv2d(3, CLASSES, 8), nn.Flatten())
    with pytest.raises(UserError, match="Sequential has no linear layer"):
        Distill(tiny_network(), [CrossTriplet()]).prepare(model, TinyImages())


@pytest.mark.parametrize("margin", [0.0, -0.2])
def test_a_margin_that_is_not_positive_is_refused(margin: float) -> None:
    with pytest.raises(UserError, match="margin is"):
        CrossTriplet(margin)


def test_more_than_one_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="2 layers are named"):
        CrossTriplet(layers=[0, 1])
