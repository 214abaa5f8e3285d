"""Norm loss against golden numbers and its own gradient, and what must be true of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, exported, tiny_network
from galago.method import Method
from galago.prune.compact import CompactStructure
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.quantize import Quantize
from galago.regularize.norm_loss import (
    NormLoss,
    UnitNorm,
    as_weight,
    by_filter,
    draw,
    lengths,
    norm_loss,
    projected,
    pull,
    put_to_one,
)
from galago.testing import check_method
from galago.trainer import Learner, finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "norm_loss.npz")
STRENGTH = float(GOLDEN["strength"])
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(3, 5, 3, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False),
    "linear": lambda: nn.Linear(9, 4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(7, 4, 2, bias=False),
}


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def layer_of(name: str) -> nn.Module:
    layer = LAYERS[name]()
    layer.weight = nn.Parameter(golden(f"{name}_weight").clone())
    return layer


def filters_of(layer: nn.Module) -> Tensor:
    return by_filter(layer, layer.weight)


@pytest.mark.parametrize("name", LAYERS)
def test_lengths_loss_gradient_and_projection_are_the_golden_ones(name: str) -> None:
    layer = layer_of(name)
    torch.testing.assert_close(lengths(filters_of(layer)).flatten().detach(), golden(f"{name}_norms"))
    loss = norm_loss(filters_of(layer))
    torch.testing.assert_close(loss.detach(), golden(f"{name}_loss_unweighted"))
    gradient = STRENGTH * as_weight(layer, pull(filters_of(layer))).detach()
    torch.testing.assert_close(gradient, golden(f"{name}_grad"), rtol=1e-9, atol=1e-12)
    unit = as_weight(layer, projected(filters_of(layer))).detach()
    torch.testing.assert_close(unit, golden(f"{name}_projected"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_fifty_steps_are_the_golden_ones_and_keep_every_direction(name: str) -> None:
    layer = layer_of(name)
    for _ in range(50):
        layer.weight.grad = torch.zeros_like(layer.weight)
        draw(layer, STRENGTH)
        layer.weight.data -= 0.5 * layer.weight.grad
    torch.testing.assert_close(layer.weight.detach(), golden(f"{name}_weight_after_50_steps_lr0.5"))
    before, after = (by_filter(layer, w).flatten(2) for w in (golden(f"{name}_weight"), layer.weight.detach()))
    alive = before.any(2)
    assert (nn.functional.cosine_similarity(before, after, dim=2)[alive] > 1 - 1e-9).all()
    assert not after[~alive].any(), "a filter of zeros is not revived"


def test_the_whole_loss_is_a_plain_sum_over_filters_and_layers() -> None:
    total = torch.stack([norm_loss(filters_of(layer_of(name))) for name in LAYERS]).sum()
    torch.testing.assert_close(STRENGTH * total.detach(), golden("total_loss_weighted"))


@pytest.mark.parametrize("name", LAYERS)
def test_the_pull_is_the_gradient_of_the_loss(name: str) -> None:
    weight = golden(f"{name}_weight").clone()
    weight[weight == 0] = 0.1  # the loss of a filter of zeros has no gradient
    layer = layer_of(name)
    layer.weight = nn.Parameter(weight)
    norm_loss(filters_of(layer)).backward()
    torch.testing.assert_close(as_weight(layer, pull(filters_of(layer))).detach(), layer.weight.grad)


def test_filters_of_grouped_transposed_convolutions_are_told_apart() -> None:
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    put_to_one(layer)
    with torch.no_grad():
        image = torch.zeros(1, 4, 1, 1)
        rows = []
        for channel in range(4):
            image.zero_()[0, channel] = 1.0
            rows.append(layer(image).flatten().clone())
    torch.testing.assert_close(torch.stack(rows).norm(dim=0), torch.ones(6))


@pytest.mark.parametrize("factory", [torch.optim.SGD, torch.optim.Adam])
def test_editing_gradients_is_adding_the_loss(factory) -> None:
    results = []
    for by_loss in (False, True):
        torch.manual_seed(0)
        model, data = tiny_network(), TinyImages()
        method = NormLoss(0.1)
        method.prepare(model, data)
        optimizer = factory(model.parameters(), lr=0.01)
        for batch in data.train():
            optimizer.zero_grad()
            loss = classify().losses(model(data.normalize(batch.input)), batch)["cross_entropy"]
            if by_loss:
                drawn = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
                loss = loss + 0.1 * torch.stack([norm_loss(filters_of(layer)) for layer in drawn]).sum()
            loss.backward()
            (optimizer.step if by_loss else lambda m=model, o=optimizer, k=method: k.update(m, o.step))()
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)


def test_a_network_of_unit_filters_trains_by_its_task_alone() -> None:
    model = tiny_network()
    for layer in (part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)):
        put_to_one(layer)
        layer.weight.grad = torch.ones_like(layer.weight)
        draw(layer, 1.0)
        assert norm_loss(filters_of(layer)) < 1e-10
        torch.testing.assert_close(layer.weight.grad, torch.ones_like(layer.weight))


def test_scaling_filters_in_front_of_a_batch_norm_changes_the_norm_loss_only() -> None:
    model, image = tiny_network().train(), torch.randn(8, 3, 8, 8)
    before, loss = model(image), norm_loss(filters_of(model.stem[0]))
    with torch.no_grad():
        model.stem[0].weight *= 3
    torch.testing.assert_close(model(image), before, rtol=1e-3, atol=1e-4)
    assert norm_loss(filters_of(model.stem[0])) > 1.1 * loss


def groups_of(model: nn.Module, method: Method) -> dict[int, float | None]:
    learner = Learner(model, classify(), [method], TinyImages().normalize)
    groups = learner.parameter_groups()
    return {id(p): group.get("weight_decay") for group in groups for p in group["params"]}


@pytest.mark.parametrize("include_head", [True, False])
def test_weights_that_are_drawn_do_not_decay_and_all_others_do(include_head: bool) -> None:
    model, method = tiny_network(), NormLoss(include_head=include_head)
    method.prepare(model, TinyImages())
    decay = groups_of(model, method)
    assert decay[id(model.stem[0].weight)] == 0.0
    assert decay[id(model.stem[1].weight)] is None
    assert decay[id(model.head.weight)] == (0.0 if include_head else None)
    method.finish(model)
    assert set(groups_of(model, method).values()) == {None}


def test_the_head_is_left_alone_where_it_is_not_included() -> None:
    model, method = tiny_network(), UnitNorm(include_head=False)
    method.prepare(model, TinyImages())
    head = clone(model.head.weight)
    method.update(model, lambda: None)
    assert torch.equal(model.head.weight, head)
    torch.testing.assert_close(lengths(filters_of(model.stem[0])), torch.ones(1, 5, 1))


@pytest.mark.parametrize(
    "make_other", [lambda: Quantize(LSQWeight(4), LSQ(4)), CutMix, lambda: CompactStructure(0.6, until=0.0)]
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [NormLoss, UnitNorm])
def test_it_trains_and_exports_beside_other_methods(make_other, first: bool, kind) -> None:
    def methods() -> list[Method]:
        both = [kind(), make_other()]
        return both if first else both[::-1]

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(2):
        trial.step(number)
    if kind is UnitNorm:
        weights = [m for m in trial.learner.model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert all(torch.allclose(lengths(filters_of(w)), torch.ones(()), atol=1e-5) for w in weights)
    assert exported(finish(trial.learner), trial.image()).isfinite().all()


def test_senseless_arguments_and_networks_are_refused() -> None:
    with pytest.raises(UserError, match="weight is -1"):
        NormLoss(weight=-1)
    with pytest.raises(UserError, match="finds no convolution"):
        NormLoss().prepare(nn.Flatten(), TinyImages())
    with pytest.raises(UserError, match="no linear layer"):
        UnitNorm(include_head=False).prepare(nn.Conv2d(3, 3, 1), TinyImages())


@pytest.mark.parametrize("make_method", [NormLoss, UnitNorm, lambda: NormLoss(include_head=False)])
def test_the_laws_of_methods_hold(make_method) -> None:
    check_method(make_method)
