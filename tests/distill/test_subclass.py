"""Subclasses within a batch against loops over images, and what must be true of them."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.distill.subclass import (
    SubclassDistillation,
    mean_of,
    median_distance,
    nearest,
    partners,
    pull_loss,
    push_loss,
    soft_labels,
    soft_loss,
    unit,
)
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, exported, tiny_network
from galago.layers import classifier
from galago.method import Forward
from galago.models.resnet import resnet20
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish
from lessons import equal

GOLDEN = np.load(Path(__file__).parents[1] / "golden/distillation/oskd.npz")
K, T = int(GOLDEN["k"]), float(GOLDEN["T"])


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def one_hot(label: Tensor) -> Tensor:
    return nn.functional.one_hot(label).double()


def distances(phi: Tensor) -> Tensor:
    return (phi[:, None] - phi[None]).square().sum(2).sqrt()


def test_every_part_is_that_of_the_golden_loops() -> None:
    phi, same = unit(golden("embedding")), partners(one_hot(golden("y")))
    near = nearest(distances(phi), same, K)
    for row, expected in zip(near, GOLDEN["neighbors"], strict=True):
        assert row.nonzero().flatten().tolist() == [j for j in expected if j >= 0]
    assert near.any(1).nonzero().flatten().tolist() == GOLDEN["valid"].tolist()
    rest = same & ~near
    assert rest.any(1).nonzero().flatten().tolist() == GOLDEN["valid_repulsion"].tolist()
    valid, repelled = near.any(1), rest.any(1)
    equal(soft_labels(golden("logits"), near, T)[valid], golden("soft_label")[valid])
    equal(mean_of(phi, near)[valid], golden("center_near")[valid])
    equal(mean_of(phi, rest)[repelled], golden("center_rest")[repelled])
    delta = median_distance(distances(phi), same)
    equal(delta, golden("delta"))
    equal(soft_loss(golden("logits"), soft_labels(golden("logits"), near, T), near, T), golden("loss_soft"))
    equal(pull_loss(phi, near), golden("loss_pull"))
    equal(push_loss(phi, rest, delta), golden("loss_push"))


def losses(
    logits: Tensor, embedding: Tensor, target: Tensor, neighbors: int = 1, adjust: bool = False
) -> tuple[Tensor, Tensor]:
    return SubclassDistillation(neighbors, T, adjust=adjust).losses(logits, embedding, target)


def test_the_whole_loss_and_its_gradients_are_the_golden_ones() -> None:
    logits, embedding = golden("logits").requires_grad_(), golden("embedding").requires_grad_()
    target = one_hot(golden("y"))
    soft, embedded = losses(logits, embedding, target, K)
    total = nn.functional.cross_entropy(logits, target)
    total = total + float(GOLDEN["lambda_soft"]) * soft + float(GOLDEN["lambda_emb"]) * embedded
    total.backward()
    equal(total, golden("total"))
    equal(logits.grad, golden("grad_logits"))
    equal(embedding.grad, golden("grad_embedding"))


def looped(logits: Tensor, embedding: Tensor, label: list[int], k: int) -> tuple[float, float]:
    """Both losses, image by image, straight from their definition."""
    phi = [row / max(float(row.norm()), 1e-12) for row in embedding]
    p = [(row / T).softmax(0) for row in logits]
    soft, pull, push, pairs = [], [], [], []
    for i, y in enumerate(label):
        same = [j for j in range(len(label)) if j != i and label[j] == y]
        pairs += [float((phi[i] - phi[j]).norm()) for j in same if j > i]
    delta = float(np.median(pairs)) if pairs else 0.0
    for i, y in enumerate(label):
        same = [j for j in range(len(label)) if j != i and label[j] == y]
        if not same:
            continue
        near = sorted(same, key=lambda j, i=i: (float((phi[i] - phi[j]).square().sum()), j))[:k]
        q = (p[i] + sum(p[j] for j in near)) / (len(near) + 1)
        soft.append(float((q * (q / p[i]).log()).sum()))
        pull.append(float((phi[i] - sum(phi[j] for j in near) / len(near)).square().sum()))
        if rest := [j for j in same if j not in near]:
            apart = float((phi[i] - sum(phi[j] for j in rest) / len(rest)).norm())
            push.append(max(0.0, delta - apart) ** 2)
    means = [sum(values) / len(values) if values else 0.0 for values in (soft, pull, push)]
    return T * T * means[0], means[1] + means[2]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("classes", [2, 4, 12])
def test_losses_agree_with_a_loop_over_images(k: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(k * classes)
    label = torch.randint(classes, (24,), generator=generator)
    logits = 3 * torch.randn(24, classes, generator=generator, dtype=torch.float64)
    embedding = torch.randn(24, 6, generator=generator, dtype=torch.float64)
    found = losses(logits, embedding, nn.functional.one_hot(label, classes).double(), k)
    assert [value.item() for value in found] == pytest.approx(looped(logits, embedding, label.tolist(), k), rel=1e-9)


def some() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    embedding = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    return logits, embedding, one_hot(torch.arange(20) % 4)


def test_where_all_labels_differ_the_loss_and_its_gradient_are_exactly_nothing() -> None:
    logits, embedding = (torch.randn(6, 6, requires_grad=True) for _ in range(2))
    soft, embedded = losses(logits, embedding, torch.eye(6))
    (soft + embedded).backward()
    assert soft.item() == embedded.item() == 0
    assert not logits.grad.any()
    assert not embedding.grad.any()


def test_a_neighbor_is_another_image_of_the_same_class_and_there_are_k_of_them() -> None:
    _, embedding, target = some()
    phi, same, label = unit(embedding), partners(target), target.argmax(1)
    for k in (1, 3, 9):
        near = nearest(distances(phi), same, k)
        assert not near.diagonal().any()
        assert all(label[i] == label[j] for i, j in near.nonzero())
        assert (near.sum(1) == min(k, 4)).all()


def test_of_equally_distant_images_the_first_is_nearer() -> None:
    distance, same = torch.zeros(5, 5), ~torch.eye(5, dtype=torch.bool)
    near = nearest(distance, same, 2)
    assert [row.nonzero().flatten().tolist() for row in near] == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1]]


def test_the_order_of_a_batch_does_not_matter() -> None:
    logits, embedding, target = some()
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    first, second = losses(logits, embedding, target), losses(logits[order], embedding[order], target[order])
    for one, other in zip(first, second, strict=True):
        assert one.item() == pytest.approx(other.item(), abs=1e-6)


def test_the_gradient_of_the_soft_loss_takes_its_label_as_given() -> None:
    logits, embedding, target = some()
    logits.requires_grad_()
    near = nearest(distances(unit(embedding)), partners(target), 1)
    q = soft_labels(logits.detach(), near, T)
    soft, _ = losses(logits, embedding, target)
    soft.backward()
    expected = T / len(near) * ((logits.detach() / T).softmax(1) - q)
    torch.testing.assert_close(logits.grad, expected)


def test_an_image_that_is_only_a_neighbor_gets_no_gradient() -> None:
    logits, embedding, _ = some()
    logits.requires_grad_()
    embedding.requires_grad_()
    phi = unit(embedding)
    near = torch.zeros(20, 20, dtype=torch.bool)
    near[0, 4] = True  # image 4 is the neighbor of image 0, and has none itself
    with torch.no_grad():
        q = soft_labels(logits, near, T)
    loss = soft_loss(logits, q, near, T) + pull_loss(phi, near) + push_loss(phi, near, torch.tensor(9.0).double())
    loss.backward()
    for gradient in (logits.grad, embedding.grad):
        assert gradient[0].any()
        assert not gradient[1:].any()


def test_targets_in_half_precision_are_as_certain() -> None:
    target = one_hot(torch.tensor([0, 1, 0, 1]))
    assert torch.equal(partners(target.bfloat16()), partners(target))
    assert partners(target.bfloat16()).any()


def test_where_answers_within_a_class_are_equal_there_is_nothing_to_learn_from_them() -> None:
    _, embedding, target = some()
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)).double()[target.argmax(1)]
    soft, embedded = losses(logits, embedding, target, 3)
    assert soft.item() == pytest.approx(0, abs=1e-12)
    assert embedded.item() > 0


def test_the_scale_of_the_embedding_does_not_matter() -> None:
    logits, embedding, target = some()
    for one, other in zip(losses(logits, embedding, target), losses(logits, 50 * embedding, target), strict=True):
        torch.testing.assert_close(one, other)


def test_embeddings_of_zeros_and_equal_embeddings_keep_gradients_finite() -> None:
    for embedding in (torch.zeros(8, 4), torch.ones(8, 4)):
        logits = torch.randn(8, 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
        given = embedding.requires_grad_()
        loss = torch.stack(losses(logits, given, torch.eye(2)[torch.arange(8) % 2])).sum()
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()
        assert given.grad.abs().max() < 10


def test_mixed_images_neither_learn_nor_are_neighbors() -> None:
    logits, embedding, target = some()
    mixed = target.clone()
    mixed[:5] = 0.7 * target[:5] + 0.3 * target[1:6]
    for one, other in zip(losses(logits, embedding, mixed), losses(logits[5:], embedding[5:], target[5:]), strict=True):
        torch.testing.assert_close(one, other)
    smoothed = 0.9 * target + 0.025
    assert [loss.item() for loss in losses(logits, embedding, smoothed)] == [0, 0]


def test_an_adjusted_average_is_right_about_its_label() -> None:
    logits, embedding, target = some()
    plain, adjusted = losses(logits, embedding, target)[0], losses(logits, embedding, target, adjust=True)[0]
    assert plain != adjusted
    surely = 20 * target + logits
    assert torch.equal(losses(surely, embedding, target)[0], losses(surely, embedding, target, adjust=True)[0])


def prepared(method: SubclassDistillation, model: nn.Module) -> SubclassDistillation:
    method.prepare(model, TinyImages())
    return method


def batch() -> Batch:
    generator = torch.Generator().manual_seed(4)
    return Batch(torch.randn(12, 3, 8, 8, generator=generator), torch.eye(3)[torch.arange(12) % 3])


def test_the_embedding_is_what_goes_into_the_classifier() -> None:
    model = tiny_network().eval()
    method = prepared(SubclassDistillation(), model)
    method.step(batch(), Forward(model, Classify(3)))
    parts = model.flatten(model.pool(model.down(model.block(model.stem(batch().input)))))
    torch.testing.assert_close(method.embedding(), parts)
    assert "'input of the classifier', 10 numbers" in str(method.summary())


@pytest.mark.parametrize(("layer", "size"), [("block", 5), (-1, 10), (0, 5)])
def test_another_layer_may_be_named_by_path_or_stage(layer: str | int, size: int) -> None:
    model = tiny_network()
    method = prepared(SubclassDistillation(layer=layer), model)
    step = method.step(batch(), Forward(model, Classify(3)))
    assert method.embedding().shape == (12, size)
    step.losses["subclass_embedding"].backward()
    assert model.stem[0].weight.grad.any()
    assert model.head.weight.grad is None


def test_classifiers_of_published_networks_are_found_also_behind_a_quantizer() -> None:
    networks = {
        "linear": resnet20(),
        "fc": timm.create_model("resnet18"),
        "head.fc": timm.create_model("convnext_atto"),
        "classifier.3": torchvision.models.mobilenet_v3_small(),
        "head": Quantize(LSQWeight(8), LSQ(8)).prepare(tiny_network(), TinyImages()),
    }
    assert [classifier(network) for network in networks.values()] == list(networks)


def test_a_model_without_a_linear_layer_asks_for_a_layer_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UserError, match=r"has no linear layer.*; name a layer"):
        prepared(SubclassDistillation(), model)
    prepared(SubclassDistillation(layer="2"), model)


def test_wrong_names_and_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean block"):
        prepared(SubclassDistillation(layer="blok"), tiny_network())
    with pytest.raises(UserError, match="the model has no stage 5"):
        prepared(SubclassDistillation(layer=5), tiny_network())
    with pytest.raises(UserError, match="neighbors is 0"):
        SubclassDistillation(neighbors=0)
    with pytest.raises(UserError, match="temperature is 0"):
        SubclassDistillation(temperature=0)


def test_the_weight_rises_as_scheduled() -> None:
    model = tiny_network().eval()

    def losses(method: SubclassDistillation) -> list[float]:
        method = prepared(method, model)
        forwards = [Forward(model, Classify(3), progress=progress) for progress in (0.0, 0.05, 0.1, 0.9)]
        return [method.step(batch(), forward).losses["subclass_soft"].item() for forward in forwards]

    full = losses(SubclassDistillation(weight=2.0))
    assert full == pytest.approx([full[0]] * 4)
    rising = [2 * one / full[0] for one in losses(SubclassDistillation())]
    assert rising == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1])


def test_nothing_is_left_in_the_finished_model_nor_in_a_copy_of_it() -> None:
    model = tiny_network()
    method = prepared(SubclassDistillation(), model)
    for network in (copy.deepcopy(model), model):
        assert any(module._forward_hooks for module in network.modules())
        assert not any(module._forward_hooks for module in method.finish(network).modules())


def test_it_obeys_the_laws() -> None:
    check_method(SubclassDistillation)
    check_method(lambda: SubclassDistillation(2, adjust=True, layer=-1, weight=1.0))


@pytest.mark.parametrize("first", [True, False])
def test_with_quantization_and_mixing_it_trains_and_is_exported(first: bool) -> None:
    own, quantize = SubclassDistillation(weight=1.0), Quantize(LSQWeight(4), LSQ(4))
    methods = [CutMix(probability=0.5, per_image=True), *([own, quantize] if first else [quantize, own])]
    trial = Trial(tiny_network, classify(), TinyImages(batch_size=16), lambda: methods)
    for number in range(2):
        step = trial.step(number)
    assert step.losses["subclass_soft"] > 0
    assert exported(finish(trial.learner), trial.image()).shape == (2, 3)


def test_the_embedding_of_a_compiled_network_is_that_of_its_last_pass() -> None:
    model = tiny_network().eval()
    method = prepared(SubclassDistillation(), model)
    compiled = torch.compile(model, backend="eager")
    for scale in (1.0, -2.0):
        method.step(batch()._replace(input=scale * batch().input), Forward(compiled, Classify(3)))
        found = method.embedding()
        model(scale * batch().input)
        torch.testing.assert_close(found, method.embedding())


def blobs(seed: int) -> tuple[Tensor, Tensor]:
    """Points of eight kinds, 2,000 of them, and their kinds; of these, every second is of the first class."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(2000) % 8
    return torch.randn(8, 16, generator=generator)[kind] + torch.randn(2000, 16, generator=generator), kind


def accuracy_and_purity(seed: int, weight: float) -> tuple[float, float]:
    """Of a small network that was told the class alone, on the second half of the points."""
    points, kind = blobs(seed)
    target = torch.eye(2)[kind % 2]
    torch.manual_seed(seed)
    body, head = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)), nn.Linear(8, 2)
    optimizer = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        drawn = torch.randint(1000, (128,))
        embedding = body(points[drawn])
        soft, embedded = losses(head(embedding), embedding, target[drawn])
        loss = nn.functional.cross_entropy(head(embedding), target[drawn]) + weight * (soft + 0.1 * embedded)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        embedding = body(points[1000:])
        right = head(embedding).argmax(1) == target[1000:].argmax(1)
        near = nearest(torch.cdist(unit(embedding), unit(embedding)), partners(target[1000:]), 1)
    pure = kind[1000:][near.float().argmax(1)] == kind[1000:]
    return float(right.float().mean()), float(pure.float().mean())


def test_neighbors_within_a_class_become_purer_for_less_than_a_point_of_accuracy() -> None:
    without, with_it = (torch.tensor([accuracy_and_purity(seed, w) for seed in range(3)]).mean(0) for w in (0.0, 1.0))
    assert with_it[1] > without[1] + 0.015
    assert with_it[0] > without[0] - 0.01
