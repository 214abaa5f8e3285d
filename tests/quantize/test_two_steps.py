"""Beginning where another run ended: which tensors come over, and what the second network then computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from galago.data import Normalize
from galago.errors import UserError
from galago.method import Method
from galago.models.reactnet import ReActNet
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.quantize.reactnet import BinaryWeight, RSign
from galago.quantize.two_steps import StartFrom
from galago.run import Run, load
from galago.schedule import LinearDecay
from galago.tasks.classify import Classify
from galago.testing import check_method, tiny_network
from galago.train import train
from samples import Stripes


def binary_network() -> ReActNet:
    return ReActNet([2, 2], [8, 12], classes=2)


def binarized(weight: BinaryWeight | None, edges: bool = True) -> Quantize:
    edge = {"edge_weight": MinMaxWeight(), "edge_input": MinMax()} if edges else {"edge_bits": None}
    return Quantize(weight, RSign(), keep=["*.shortcut"], **edge)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A finished first step: binary inputs, real weights, 8-bit edges; thresholds have moved."""
    folder = tmp_path_factory.mktemp("runs") / "step1"
    torch.manual_seed(3)
    net = train(
        binary_network(),
        Classify(2),
        Stripes(),
        folder,
        epochs=2,
        methods=[binarized(None)],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3, weight_decay=5e-6),
        schedule=LinearDecay(),
        accelerator="cpu",
    )
    assert net.layer1[1].conv.input_quantizer.shift.abs().min() > 0
    return folder


def begun(methods: list[Method]) -> nn.Module:
    """The network as it is when training begins; its own weights are always the same."""
    torch.manual_seed(7)
    net = binary_network()
    for method in methods:
        net = method.prepare(net, Stripes())
    for method in methods:
        net = method.epoch(net, 0)
    return net.eval()


def second(first: Path, weight: BinaryWeight | None) -> nn.Module:
    return begun([StartFrom(first), binarized(weight)])


def images() -> torch.Tensor:
    data = Stripes()
    return data.normalize(data.validation()[0].input)


def test_everything_of_the_first_step_is_there_thresholds_ranges_and_statistics_too(first):
    one, two = load(first), second(first, BinaryWeight())
    state = two.state_dict()
    assert {name for name in state if name not in one.state_dict()} == {
        f"layer{stage}.{block}.conv.weight_quantizer.scale" for stage in (1, 2) for block in (0, 1)
    }
    for name, tensor in one.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_the_same_recipe_again_computes_what_the_run_does(first):
    assert torch.equal(second(first, None)(images()), load(first)(images()))


def test_the_second_network_is_the_first_with_scaled_signs_for_weights(first):
    one = load(first)
    with torch.no_grad():
        for stage in (one.layer1, one.layer2):
            for block in stage:
                weight = block.conv.layer.weight
                weight.copy_(weight.abs().mean((1, 2, 3), keepdim=True) * torch.where(weight >= 0, 1.0, -1.0))
    torch.testing.assert_close(second(first, BinaryWeight())(images()), one(images()))


def test_ranges_that_the_first_run_lacks_are_set_on_what_it_left(first):
    nothing_else = [StartFrom(first, ranges=False), four_bits()]
    found, alone, fresh = (begun(methods) for methods in ([StartFrom(first), four_bits()], nothing_else, [four_bits()]))
    steps = [net.linear.input_quantizer.step.item() for net in (found, alone, fresh)]
    assert steps[0] == steps[1] != steps[2]
    for name, tensor in load(first).named_buffers():
        if "running" in name:
            assert torch.equal(found.get_buffer(name), tensor), "setting ranges leaves no trace in statistics"


def four_bits() -> Quantize:
    return Quantize(LSQWeight(4), LSQ(4), keep=["*.shortcut"])


def test_ranges_may_stay_behind(first):
    net = begun([StartFrom(first, ranges=False), binarized(BinaryWeight())])
    assert not net.layer1[1].conv.input_quantizer.shift.any()
    assert torch.equal(net.layer1[1].conv.layer.weight, load(first).layer1[1].conv.layer.weight)


def test_float_and_quantized_runs_serve_both_kinds_of_networks(first, tmp_path):
    plain = binary_network()
    Run(tmp_path / "float").folder.mkdir()
    plain.__dict__["built_from"] = None
    Run(tmp_path / "float").save_model(plain, Normalize([0.5] * 3, [0.25] * 3))
    binary = second(tmp_path / "float", BinaryWeight())
    assert torch.equal(binary.layer1[0].conv.layer.weight, plain.layer1[0].conv.weight)
    back = begun([StartFrom(first)])
    assert torch.equal(back.layer1[0].conv.weight, load(first).layer1[0].conv.layer.weight)


def test_the_second_run_trains_from_there(first, tmp_path):
    trained = train(
        binary_network(),
        Classify(2),
        Stripes(),
        tmp_path / "second",
        epochs=1,
        methods=[StartFrom(first), binarized(BinaryWeight())],
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        schedule=LinearDecay(),
        accelerator="cpu",
    )
    weight = trained.layer1[1].conv.layer.weight
    moved = (weight - load(first).layer1[1].conv.layer.weight).abs().max()
    assert 0 < moved < 3 * 1.1e-3, "three steps of Adam from where the first run ended"


def test_what_is_resumed_does_not_need_the_first_run(tmp_path):
    method, net = StartFrom(tmp_path / "gone"), binary_network()
    method.load_state_dict({"done": torch.tensor(True)})
    before = [parameter.clone() for parameter in net.parameters()]
    assert method.epoch(method.prepare(net, Stripes()), 1) is net
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_another_network_is_refused_by_name(first):
    with pytest.raises(UserError, match=r"holds another network than this recipe's model: .*conv1.weight.* and \d+ mo"):
        StartFrom(first).prepare(tiny_network(), Stripes())


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        StartFrom(tmp_path / "none").prepare(binary_network(), Stripes())


def test_it_obeys_the_laws_of_a_method(tmp_path):
    folder = tmp_path / "float"
    folder.mkdir()
    Run(folder).save_model(tiny_network(), Normalize([0.5] * 3, [0.25] * 3))
    check_method(lambda: StartFrom(folder))
