"""Branches for groups of confused classes: the golden loss, what ships, and what is said of wrong input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.augment.cutmix import CutMix
from galago.batch import Batch
from galago.deploy import onnx
from galago.deploy.verify import compare
from galago.distill.native_ensemble import NativeEnsemble
from galago.errors import UserError
from galago.laws.trial import TinyImages, Trial, classify, tiny_network
from galago.measure import unwrapped
from galago.method import Forward
from galago.models.tiny import Tiny
from galago.probe import Deployed
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.regularize.autogenous import Autogenous
from galago.regularize.auxiliary import Auxiliary, auxiliary_in
from galago.regularize.grouping import grouping
from galago.run import load
from galago.testing import check_method
from galago.train import train
from galago.trainer import finish

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "regularization" / "ssal.npz")
DATA = TinyImages()


def golden(name: str) -> Tensor:
    return torch.from_numpy(np.asarray(GOLDEN[name]))


def autogenous(ship_joint: bool = False, groups=(2, 2)) -> Autogenous:
    return Autogenous(tiny_network(), ["stem", "down"], list(groups), [0.5, 2.0], ship_joint=ship_joint)


def started(*methods) -> Trial:
    return Trial(tiny_network, classify(), TinyImages(), lambda: [one() for one in methods])


def test_the_loss_and_its_gradients_are_those_of_the_golden_vectors() -> None:
    class Told(Auxiliary):
        """Whose answers are given."""

        def __init__(self, main: Tensor, branches: list[Tensor]) -> None:
            nn.Module.__init__(self)
            self.layer, self.main, self.given = nn.Identity(), main, branches

        def forward(self, x: Tensor) -> Tensor:
            return self.main

        def said(self) -> list[Tensor]:
            return self.given

    main = golden("joint_main_logits").requires_grad_()
    branches = [golden(f"joint_branch{number}_logits").requires_grad_() for number in range(2)]
    method = Autogenous(nn.Identity(), ["a", "b"], [3, 5], golden("joint_loss_weights").tolist())
    method.maps = [golden(f"joint_branch{number}_map").tolist() for number in range(2)]
    target = nn.functional.one_hot(golden("joint_labels").long(), 10).double()
    step = method.step(Batch(torch.zeros(7, 1), target), Forward(Told(main, branches), classify()))
    assert list(step.losses) == ["cross_entropy", "groups_1", "groups_2"]
    total = sum(step.losses.values())
    torch.testing.assert_close(total, golden("joint_loss"), rtol=1e-9, atol=1e-12)
    total.backward()
    torch.testing.assert_close(main.grad, golden("joint_grad_main"), rtol=1e-9, atol=1e-12)
    for number, branch in enumerate(branches):
        torch.testing.assert_close(branch.grad, golden(f"joint_grad_branch{number}"), rtol=1e-9, atol=1e-12)


def test_groups_come_from_the_confusions_on_validation_images() -> None:
    base = tiny_network().eval()
    counts = torch.zeros(3, 3)
    for batch in DATA.validation():
        for label, decided in zip(batch.target.argmax(1), base(DATA.normalize(batch.input)).argmax(1), strict=True):
            counts[label, decided] += 1
    method = Autogenous(base, ["stem"], [2])
    assert torch.equal(method.confusion(DATA, torch.device("cpu")), counts.long())
    method.prepare(tiny_network(), DATA)
    assert method.maps == [grouping(counts, 2)]


def test_a_file_of_predictions_will_do(tmp_path: Path) -> None:
    output, target = np.random.default_rng(0).normal(size=(60, 4)), np.arange(60) % 3  # the last score is of abstaining
    np.savez(tmp_path / "model.npz", output=output, target=target)
    method = Autogenous(tmp_path / "model.npz", ["stem"], [2])
    expected = np.zeros((3, 3))
    for row, label in zip(output, target, strict=True):
        expected[label, row[:3].argmax()] += 1
    assert method.confusion(DATA, torch.device("cpu")).tolist() == expected.tolist()


def test_what_the_paper_calls_tr_ships_the_network_as_large_as_it_was() -> None:
    trial = started(autogenous)
    trial.step(0)
    model, images = trial.learner.model.eval(), trial.image()
    with torch.no_grad():
        expected = model.heads(images).main
        alone = finish(trial.learner)
        torch.testing.assert_close(alone(images), expected, rtol=0, atol=1e-6)
    assert type(alone) is Tiny
    assert sum(p.numel() for p in alone.parameters()) == sum(p.numel() for p in tiny_network().parameters())


def test_what_the_paper_calls_jp_ships_the_joint_probability_and_the_maps_with_it(tmp_path: Path) -> None:
    method = autogenous(ship_joint=True)
    model = train(tiny_network(), classify(), TinyImages(), tmp_path, epochs=1, methods=[method])
    image = DATA.normalize(DATA.validation()[0].input)
    again = load(tmp_path)
    assert again.groups == method.maps
    with torch.no_grad():
        torch.testing.assert_close(again(image), model(image), rtol=0, atol=0)
        torch.testing.assert_close(classify().decode(model(image)), model.heads(image).joint.exp())
    assert isinstance(unwrapped(load(tmp_path)), Auxiliary)


@pytest.mark.parametrize("ship_joint", [False, True])
def test_a_quantized_network_trains_with_mixed_images_ships_and_is_verified(ship_joint: bool, tmp_path: Path) -> None:
    quantize = Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8))
    methods = [CutMix(probability=1.0), quantize, autogenous(ship_joint)]
    model = train(tiny_network(), classify(), TinyImages(), tmp_path, epochs=1, methods=methods)
    data = TinyImages()  # of its own, for verification computes in float64
    image = data.normalize(data.example())
    torch.testing.assert_close(load(tmp_path)(image), model(image), rtol=0, atol=0)
    trained = Deployed(model, data.normalize, classify()).eval()
    path = onnx.export(trained, data.example(), tmp_path / "model.onnx")
    outcome = compare(trained, {"onnxruntime": path}, Parts(classify(), TinyImages(), ()), images=48)
    assert outcome["passed"], outcome


def test_quantizing_behind_it_quantizes_the_network_alone() -> None:
    trial = started(autogenous, lambda: Quantize(LSQWeight(4), LSQ(4)))
    assert trial.step(0).loss.isfinite()
    assert not isinstance(finish(trial.learner), Auxiliary)
    with pytest.raises(UserError, match="list Quantize in front of Autogenous"):
        started(lambda: autogenous(ship_joint=True), lambda: Quantize(LSQWeight(4), LSQ(4)))


@pytest.mark.parametrize(("first", "ship_joint"), [(True, False), (False, False), (False, True)])
def test_branched_networks_have_branches_for_groups_too(first: bool, ship_joint: bool) -> None:
    methods = [lambda: Autogenous(tiny_network(), ["stem"], [2], ship_joint=ship_joint), lambda: NativeEnsemble("down")]
    trial = started(*(methods if first else methods[::-1]))
    losses = trial.step(0).losses
    assert {"groups_1", "branch_1_from_gated"} <= losses.keys()
    finished = finish(trial.learner)
    assert isinstance(finished, Auxiliary if ship_joint else Tiny)
    assert finished(trial.image()).isfinite().all()


def test_mixed_targets_are_mixed_groups() -> None:
    trial = started(lambda: CutMix(probability=1.0), autogenous)
    step = trial.step(0)
    assert ((step.batch.target > 0).sum(1) > 1).any()
    assert all(loss.isfinite() for loss in step.losses.values())


def test_it_obeys_the_laws() -> None:
    check_method(autogenous)
    check_method(lambda: autogenous(ship_joint=True))


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    base = tiny_network()
    with pytest.raises(UserError, match="as many groups"):
        Autogenous(base, ["stem"], [2, 3])
    with pytest.raises(UserError, match="as many groups"):
        Autogenous(base, ["stem"], [2], [1.0, 1.0])
    with pytest.raises(UserError, match="as many groups"):
        Autogenous(base, [], [])
    with pytest.raises(UserError, match="exponent is -1"):
        Autogenous(base, ["stem"], [2], exponent=-1.0)
    with pytest.raises(UserError, match="4 groups of 3 classes; give 2 to 3"):
        Autogenous(base, ["stem"], [4]).prepare(tiny_network(), DATA)
    with pytest.raises(UserError, match="1 groups of 3 classes"):
        Autogenous(base, ["stem"], [1]).prepare(tiny_network(), DATA)
    with pytest.raises(UserError, match="no layer 'steam'"):
        Autogenous(base, ["steam"], [2]).prepare(tiny_network(), DATA)
    with pytest.raises(UserError, match="tells 2 classes apart; the data have 3"):
        Autogenous(Tiny(2, 3), ["stem"], [2]).prepare(tiny_network(), DATA)
    with pytest.raises(UserError, match=r"is no file of predictions"):
        Autogenous(tmp_path / "none.npz", ["stem"], [2]).prepare(tiny_network(), DATA)
    with pytest.raises(UserError, match="4 outputs for 3 classes"):
        Autogenous(base, ["stem"], [2], ship_joint=True).prepare(Tiny(4, 3), DATA)
    np.savez(tmp_path / "perfect.npz", output=np.eye(3), target=np.arange(3))
    with pytest.raises(UserError, match="confuses no classes"):
        Autogenous(tmp_path / "perfect.npz", ["stem"], [2]).prepare(tiny_network(), DATA)


def test_the_summary_tells_the_groups() -> None:
    method = autogenous(groups=(2, 3))
    assert method.summary() is None
    method.prepare(tiny_network(), DATA)
    told = method.summary()
    assert told is not None
    assert "Autogenous: stem tells apart {" in told
    assert told.count("{") == 5


def test_a_peer_without_branches_is_left_alone() -> None:
    method, network = autogenous(), tiny_network()
    method.prepare(tiny_network(), DATA)
    batch = DATA.train()[0]
    step = method.step(batch._replace(input=DATA.normalize(batch.input)), Forward(network, classify()))
    assert list(step.losses) == ["cross_entropy"]
    assert auxiliary_in(network) is None
