from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch, Step
from galago.datasets.texts import Texts
from galago.deploy import onnx, openvino
from galago.deploy.verify import compare
from galago.distill.distill import Distill
from galago.distill.logits import SoftTargets
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, clone, identical, tiny_network
from galago.method import Forward, Method
from galago.probe import Deployed
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.run import Run, load
from galago.search.cell_network import CellNetwork
from galago.search.nas_kd import NasKd, described, halves, part
from galago.search.space import OPERATIONS, ImageSpace, Operation, TextSpace
from galago.search.student import student
from galago.search.super_network import SuperNetwork
from galago.tasks.classify import Classify
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish
from samples import StopAt, Stopped, Stripes


def network(classes: int = 3) -> SuperNetwork:
    return SuperNetwork(ImageSpace(stride=2), classes, width=4, nodes=2, depths=[1, 2])


def distill() -> Distill:
    torch.manual_seed(5)
    return Distill(tiny_network(), [SoftTargets(4.0, 0.8)], task_weight=0.2)


def trial(*methods: Method, make: Any = network) -> Trial:
    return Trial(make, classify(), TinyImages(), lambda: list(methods))


class Watch(Method):
    """Keeps what every pass through the network is given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def step(self, batch: Batch, inner: Forward) -> Step:
        self.seen.append(batch.extra["index"])
        return inner(batch)


@pytest.mark.parametrize("hard", [False, True])
def test_it_obeys_the_laws(hard: bool) -> None:
    check_method(partial(NasKd, hard=hard), network, same_answer=False)


def test_the_two_halves_are_disjoint_and_equal_and_stay_so() -> None:
    watch = Watch()
    started = trial(NasKd(), watch)
    for number in range(6):
        started.step(number % 6)
    choice, weights = (torch.cat(watch.seen[first::2]) for first in (0, 1))
    assert not set(choice.tolist()) & set(weights.tolist())
    assert len(choice) == len(weights) == 24
    assert torch.equal(halves(48, 0), halves(48, 0))
    assert not torch.equal(halves(48, 0), halves(48, 1))


def test_a_part_of_a_batch_keeps_all_that_belongs_to_its_images() -> None:
    batch = Batch(torch.arange(3.0), torch.arange(3), {"index": torch.tensor([7, 8, 9])})
    taken = part(batch, torch.tensor([True, False, True]))
    assert [tensor.tolist() for tensor in (taken.input, taken.target, taken.extra["index"])] == [[0, 2], [0, 2], [7, 9]]


class Still(NasKd):
    """A search that chooses nothing."""

    def _choose(self, network: SuperNetwork, batch: Batch, inner: Forward) -> None:
        return


def numbers(model: nn.Module) -> dict[str, Tensor]:
    assert isinstance(model, SuperNetwork)
    return clone({"a": model.a, "d": model.d})


def test_a_step_of_the_weights_leaves_the_choice_alone() -> None:
    started = trial(Still())
    before = numbers(started.learner.model)
    weights = clone(dict(started.learner.model.named_parameters()))
    started.step(0)
    assert identical(before, numbers(started.learner.model))
    assert not identical(weights, clone(dict(started.learner.model.named_parameters())))


def test_a_step_of_the_choice_leaves_the_weights_and_their_gradients_alone() -> None:
    started = trial(NasKd(rate=0.1))
    model, (method,) = started.learner.model, started.learner.ideas
    assert isinstance(model, SuperNetwork)
    assert isinstance(method, NasKd)
    weights, before = clone(dict(model.named_parameters())), numbers(model)
    batch = started.batches[0]
    model.draw(1.0)
    method._choose(
        model, batch._replace(input=started.data.normalize(batch.input)), Forward(model, started.learner.task)
    )
    assert identical(weights, clone(dict(model.named_parameters())))
    assert all(parameter.grad is None for parameter in model.parameters())
    after = numbers(model)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert not model.a.requires_grad


def test_the_choice_moves_as_adam_moves_it_by_the_gradient_of_the_whole_loss() -> None:
    started = trial(NasKd(mu=0.7, rate=0.05, decay=1e-3), distill())
    model = started.learner.model
    assert isinstance(model, SuperNetwork)
    method, batch = started.learner.ideas[0], started.batches[0]
    assert isinstance(method, NasKd)
    batch = batch._replace(input=started.data.normalize(batch.input))
    inner = Forward(model.train(), started.learner.task, started.learner.ideas[1:])
    model.draw(0.5)
    choice = [tensor.clone() for tensor in (model.a, model.d)]
    for tensor in (model.a, model.d):
        tensor.requires_grad_()
    step = inner(batch)
    assert step.losses.keys() == {"cross_entropy", "soft_targets"}
    slopes = torch.autograd.grad(step.loss + 0.7 * model.expected_cost(), [model.a, model.d])
    for tensor, slope in zip(choice, slopes, strict=True):
        tensor.grad = slope
    torch.optim.Adam(choice, 0.05, (0.5, 0.999), weight_decay=1e-3).step()
    for tensor in (model.a, model.d):
        tensor.requires_grad_(False)
    method._choose(model, batch, inner)
    torch.testing.assert_close([model.a, model.d], choice)


def test_losses_in_the_log_are_those_of_what_teaches_and_the_cost() -> None:
    step = trial(NasKd(mu=0.5), distill()).step(0)
    assert step.losses.keys() == {"cross_entropy", "soft_targets", "cost"}
    assert not step.losses["cost"].requires_grad


def test_the_temperature_falls_geometrically() -> None:
    started, seen = trial(NasKd(temperature=1.0, last_temperature=0.01)), []
    for number in (0, 3):
        started.step(number)
        seen.append(started.learner.model.temperature.item())
    assert seen == pytest.approx([1.0, 0.1])


def test_a_batch_without_an_image_for_the_weights_teaches_them_nothing() -> None:
    started = trial(NasKd())
    started.learner.ideas[0].first_half.fill_(True)
    weights = clone(dict(started.learner.model.named_parameters()))
    assert started.step(0).loss == 0
    assert identical(weights, clone(dict(started.learner.model.named_parameters())))


def test_a_dearer_cost_never_finds_a_larger_student() -> None:
    sizes = []
    for mu in (0.0, 1.0, 30.0):
        started = trial(NasKd(mu=mu, rate=0.5))
        model = started.learner.model
        assert isinstance(model, SuperNetwork)
        model.a[:, OPERATIONS.index(Operation.conv_7)] += 2.0  # large at first, as no task here asks for it
        model.d[1] += 0.5
        for number in range(6):
            started.step(number)
        sizes.append(sum(p.numel() for p in finish(started.learner).parameters()))
    assert sizes[0] > sizes[1] >= sizes[2]


def test_what_is_finished_is_an_ordinary_network_that_a_run_gives_back(tmp_path: Path) -> None:
    model = network(2)
    trained = train(model, Classify(2), Stripes(), tmp_path / "search", epochs=1, methods=[NasKd()], accelerator="cpu")
    assert isinstance(trained, CellNetwork)
    x = Stripes().normalize(Stripes().example())
    assert torch.equal(load(tmp_path / "search")(x), trained(x))
    assert described(trained).endswith(f"{sum(p.numel() for p in trained.parameters()):,} parameters")
    assert {line["kind"] for line in Run(tmp_path / "search").history()} == {"step", "epoch"}


def test_a_search_killed_and_resumed_equals_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def search(folder: Path) -> nn.Module:
        torch.manual_seed(3)
        return train(
            *(network(2), Classify(2), Stripes(), folder),
            epochs=2,
            methods=[NasKd(rate=0.1), StopAt()],
            checkpoint_every=2,
            accelerator="cpu",
        )

    whole = search(tmp_path / "whole")
    monkeypatch.setattr(StopAt, "at", 8)  # two passes a step, three steps an epoch
    with pytest.raises(Stopped):
        search(tmp_path / "parts")
    monkeypatch.setattr(StopAt, "at", 0)
    assert identical(dict(whole.state_dict()), dict(search(tmp_path / "parts").state_dict()))


def test_it_trains_with_mixed_images_and_the_student_may_be_quantized_and_exported(tmp_path: Path) -> None:
    found = train(
        *(network(2), Classify(2), Stripes(), tmp_path / "search"),
        epochs=1,
        methods=[NasKd(), CutMix()],
        accelerator="cpu",
    )
    assert isinstance(found, CellNetwork)
    made = student(str(tmp_path / "search"))
    quantize = Quantize(LSQWeight(8), LSQ(8), stream=MinMax(8))
    trained = train(
        *(made, Classify(2), Stripes(), tmp_path / "student"), epochs=1, methods=[quantize], accelerator="cpu"
    )
    deployed = Deployed(trained, Stripes().normalize, Classify(2))
    path = onnx.export(deployed, Stripes().example(), tmp_path / "model.onnx")
    outcome = compare(deployed, {"onnxruntime": path}, Parts(Classify(2), Stripes(), ()), images=32)
    assert outcome["passed"], outcome


EVERYTHING = [
    *((0, start, operation) for start, operation in enumerate((Operation.conv_7, Operation.dilated_5))),
    *((1, start, operation) for start, operation in enumerate((Operation.average, Operation.maximum))),
    *((2, start + 1, operation) for start, operation in enumerate((Operation.identity, Operation.conv_1))),
]


def test_a_student_of_texts_is_the_same_in_both_engines(tmp_path: Path) -> None:
    table = tmp_path / "texts.csv"
    rows = [f"{word} number {number},{label}" for label, word in enumerate(("one", "another")) for number in range(20)]
    table.write_text("\n".join(["text,label", *rows]))
    data = Texts(str(table), length=24, batch_size=8, hold_out=0.25)
    made = CellNetwork(TextSpace(), EVERYTHING, classes=2, depth=2, width=6)
    trained = train(made, Classify(2), data, tmp_path / "run", epochs=1, accelerator="cpu")
    deployed = Deployed(trained, data.normalize, Classify(2))
    files = {name: tmp_path / f"model.{end}" for name, end in (("onnxruntime", "onnx"), ("openvino", "xml"))}
    onnx.export(deployed, data.example(), files["onnxruntime"])
    openvino.export(deployed, data.example(), files["openvino"])
    outcome = compare(deployed, files, Parts(Classify(2), data, ()), images=10)
    assert outcome["passed"], outcome
    assert np.isfinite(Run(tmp_path / "run").history()[-1]["accuracy"])


def test_another_model_or_a_quantized_one_is_named() -> None:
    with pytest.raises(UserError, match=r"not in a Tiny: make the recipe's model a galago\.search"):
        trial(NasKd(), make=tiny_network)
    with pytest.raises(UserError, match="quantize the student in a second run"):
        trial(Quantize(LSQWeight(8), LSQ(8), stream=MinMax(8)), NasKd())


def test_data_that_do_not_count_their_images_are_named() -> None:
    data = TinyImages()
    data.images = None
    with pytest.raises(UserError, match="do not say how many images"):
        NasKd().prepare(network(), data)


def test_batches_that_do_not_say_which_images_they_hold_are_named() -> None:
    started = trial(NasKd())
    started.batches[0] = started.batches[0]._replace(extra={})
    with pytest.raises(UserError, match=r"give `extra\['index'\]`"):
        started.step(0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"mu": -1.0}, "mu -1"),
        ({"rate": 0.0}, "rate 0 above 0"),
        ({"decay": -0.1}, "decay -0.1"),
        ({"temperature": 0.05}, "temperature falls from 0.05 to 0.1"),
        ({"last_temperature": 0.0}, "usually 1 and 0.1"),
    ],
)
def test_numbers_that_make_no_search_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        NasKd(**wrong)
