"""Manifold Mixup: what is averaged where, that labels follow, and whom it suits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.augment.manifold_mixup import ManifoldMixup, Mixture, mixed
from galago.batch import Batch
from galago.distill.mutual import MutualLearning
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, close, exported, identical, tiny_network
from galago.layers import tap
from galago.method import Forward, Method
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.taps import Changes
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.trainer import finish
from noise import normalized_batch


def prepared(model: nn.Module, method: ManifoldMixup) -> ManifoldMixup:
    method.prepare(model, TinyImages())
    return method


def test_each_batch_of_several_is_mixed_by_itself() -> None:
    h, partners = torch.randn(2, 4, 3, 5), torch.tensor([2, 0, 3, 1])
    found = mixed(h.flatten(0, 1), Mixture(0, partners, torch.tensor(0.3))).view_as(h)
    for image in range(4):
        torch.testing.assert_close(found[:, image], 0.3 * h[:, image] + 0.7 * h[:, partners[image]])


def test_what_the_next_layer_sees_is_the_average_that_the_labels_are() -> None:
    """Features that carry their own label, in a network that would change nothing."""
    places: Counter[str] = Counter()
    for seed in range(60):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Identity(), nn.Identity(), nn.Flatten()).train()
        method = ManifoldMixup(["0", "1"])
        method._paths = ["0", "1"]
        method._changes = Changes(network, method._paths, method._mix)
        image = torch.eye(8).view(8, 1, 1, 8)
        seen: list[Tensor] = []
        for layer in network:
            layer.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].flatten(1)))
        step = method.step(Batch(image, torch.eye(8)), Forward(network, Classify(8)))
        torch.testing.assert_close(seen[2], step.batch.target)
        plain = [torch.equal(one, torch.eye(8)) for one in seen]
        places["input" if not plain[0] else "first" if not plain[1] else "second"] += 1
    assert len(places) == 3
    assert min(places.values()) > 8


def test_layers_are_found_by_stage_and_run_mixed_in_training_only() -> None:
    model, batch = tiny_network(), normalized_batch()
    method = prepared(model, ManifoldMixup())
    assert method.summary() == "ManifoldMixup: mixes the input or what block or down gives"
    method._mixture = Mixture(0, torch.arange(8).flip(0), torch.tensor(0.25))
    for part in model.modules():
        part.training = False
    model.block.training = True  # alone, so that BatchNorm stays the same
    with tap(model.block, "relu") as plain, tap(model, "block") as changed, torch.no_grad():
        model(batch.input)
    torch.testing.assert_close(changed.value, 0.25 * plain.value + 0.75 * plain.value.flip(0))
    with tap(model.block, "relu") as plain, tap(model, "block") as changed, torch.no_grad():
        model.eval()(batch.input)
    assert torch.equal(plain.value, changed.value)


def test_the_place_is_forgotten_after_the_step() -> None:
    model = tiny_network().train()
    method = prepared(model, ManifoldMixup())
    for _ in range(5):
        method.step(normalized_batch(), Forward(model, classify()))
        assert method._mixture is None


def test_at_probability_zero_training_is_exactly_that_without_it() -> None:
    trained = []
    for methods in ([ManifoldMixup(probability=0.0)], []):
        trial = Trial(tiny_network, classify(), TinyImages(), lambda methods=methods: methods)
        for number in range(3):
            trial.step(number)
        trained.append(trial.learner.model.state_dict())
    assert identical(*trained)


def test_probability_is_the_share_of_batches_mixed() -> None:
    model, batch = tiny_network().train(), normalized_batch()
    method = prepared(model, ManifoldMixup(probability=0.25))
    with torch.no_grad():
        steps = [method.step(batch, Forward(model, classify())).batch for _ in range(200)]
    assert abs(sum(one is not batch for one in steps) / 200 - 0.25) < 0.09


def test_the_given_batch_is_left_alone_and_the_laws_are_obeyed() -> None:
    check_method(ManifoldMixup)
    check_method(lambda: ManifoldMixup(["head"], alpha=0.2, probability=0.5))


def test_a_peer_that_has_no_such_hooks_sees_mixed_images() -> None:
    peer, batch = tiny_network().train(), normalized_batch()
    method = prepared(tiny_network(), ManifoldMixup())
    for _ in range(6):
        step = method.step(batch, Forward(peer, classify()))
        assert not torch.equal(step.batch.input, batch.input)
        assert not torch.equal(step.batch.target, batch.target)
    trial = Trial(tiny_network, classify(), TinyImages(), lambda: [MutualLearning([tiny_network()]), ManifoldMixup()])
    assert trial.step(0).loss.isfinite()


def quantize() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), edge_input=MinMax(8), stream=MinMax(8))


@pytest.mark.parametrize(
    "listed",
    [lambda: [quantize(), ManifoldMixup()], lambda: [ManifoldMixup(), quantize()], lambda: [CutMix(), ManifoldMixup()]],
)
def test_it_trains_finishes_and_exports_with_others(listed) -> None:
    def methods() -> list[Method]:
        return listed()

    trial = Trial(tiny_network, classify(), TinyImages(), methods)
    for number in range(3):
        assert trial.step(number).loss.isfinite()
    finished = finish(trial.learner)
    assert not any(part._forward_hooks for part in finished.modules())
    assert close(finished(trial.image()), exported(finished, trial.image()))


def test_it_compiles_without_a_break_once_for_each_place() -> None:
    model = tiny_network()
    method, graphs = prepared(model, ManifoldMixup()), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.train().compile(backend=backend, fullgraph=True)
    for _ in range(12):
        method.step(normalized_batch(), Forward(model, classify()))
    assert len(graphs) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"alpha": 0.0}, "alpha is 0"), ({"probability": 2.0}, "probability"), ({"layers": []}, "layers is empty")],
)
def test_numbers_that_mean_nothing_are_refused(arguments, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ManifoldMixup(**arguments)


def test_layers_that_are_not_there_are_refused_before_training() -> None:
    with pytest.raises(UserError, match="no layer 'layer9'"):
        prepared(tiny_network(), ManifoldMixup(["layer9"]))
    with pytest.raises(UserError, match="ManifoldMixup has no stage 5; its stages are 0: block, 1: down"):
        prepared(tiny_network(), ManifoldMixup([5]))


def test_targets_that_are_no_probabilities_are_refused() -> None:
    batch = normalized_batch()._replace(target=torch.arange(8) % 3)
    with pytest.raises(UserError, match="ManifoldMixup needs class probabilities"):
        prepared(tiny_network(), ManifoldMixup()).step(batch, Forward(tiny_network(), classify()))
