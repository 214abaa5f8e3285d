"""Signs against the official code's numbers, as bits that are counted, and in files."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from galago.deploy import onnx, openvino
from galago.deploy.integer import lower
from galago.deploy.onnx import build, integer_layers
from galago.deploy.pack import pack
from galago.deploy.runtime import OnnxRuntime, OpenVINO
from galago.distill.logits import softened_divergence
from galago.errors import UserError
from galago.laws.integers import quantized_layer
from galago.models.reactnet import PairBlock, ReActNet, RPReLU
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize, Rule
from galago.quantize.reactnet import BinaryWeight, RSign, mean_size, scaled_sign, sign
from galago.spec import build as build_from
from galago.spec import describe
from galago.tasks.classify import Classify
from galago.testing import check_quantizer
from samples import Stripes


@pytest.fixture(scope="module")
def want(golden) -> dict[str, Tensor]:
    return golden("adambnn_reactnet")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(
        found.detach(), expected.to(found.dtype), rtol=0, atol=tolerance * max(1.0, expected.abs().max().item())
    )


def test_the_sign_and_its_gradient_are_the_official_codes(want):
    u = want["sign_u"].clone().requires_grad_()
    y = sign(u, torch.zeros(()))
    y.backward(want["sign_grad_out"])
    assert torch.equal(y.detach(), want["sign_expected_y"])
    close(u.grad, want["sign_expected_grad_u"])


def test_thresholds_and_their_gradient_are_the_official_codes(want):
    quantizer, x = RSign(3), want["rsign_x"].clone().requires_grad_()
    quantizer.shift.data.copy_(want["rsign_b"])
    y = quantizer(x)
    y.backward(want["rsign_grad_out"])
    assert torch.equal(y.detach(), want["rsign_expected_y"])
    close(x.grad, want["rsign_expected_grad_x"])
    close(quantizer.shift.grad, want["rsign_expected_grad_b"])


def test_rprelu_is_the_official_codes(want):
    module, x = RPReLU(3), want["rprelu_x"].clone().requires_grad_()
    places = {"p": module.before, "slope": module.slope, "q": module.after}
    for name, parameter in places.items():
        parameter.data.copy_(want[f"rprelu_{name}"].view(parameter.shape))
    y = module(x)
    y.backward(want["rprelu_grad_out"])
    close(y, want["rprelu_expected_y"])
    close(x.grad, want["rprelu_expected_grad_x"])
    for name, parameter in places.items():
        close(parameter.grad.flatten(), want[f"rprelu_expected_grad_{name}"])


def test_a_binary_convolution_is_the_official_codes_and_counts_bits(want):
    weight, a = want["bconv_weight"], want["bconv_a"]
    stride, padding = int(want["bconv_stride"]), int(want["bconv_padding"])
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], stride, padding, bias=False)
    conv.weight.data.copy_(weight)
    layer, x = QuantLayer(conv, BinaryWeight()), a.float().requires_grad_()
    y = layer(x)
    y.backward(want["bconv_grad_out"])
    close(layer.weight_quantizer.scale, want["bconv_expected_alpha"])
    close(y, want["bconv_expected_y"])
    close(x.grad, want["bconv_expected_grad_a"])
    close(conv.weight.grad, want["bconv_expected_grad_weight"])
    assert conv.weight.grad.flatten()[:4].tolist()[2:] == [0, 0], "beyond 1 nothing passes"
    dot = (y / layer.weight_quantizer.scale.view(-1, 1, 1)).detach()
    close(dot, want["bconv_expected_int_dot"].float())
    valid = nn.functional.conv2d(torch.ones_like(x), torch.ones_like(conv.weight), None, stride, padding)
    differing = (valid - dot.round()) / 2  # n - 2 popcount(a xor w), where padding is no tap
    bits = nn.functional.unfold(x.detach(), 3, padding=padding, stride=stride)
    signs = torch.where(weight >= 0, 1.0, -1.0).flatten(1)
    counted = ((bits[:, None] * signs[None, :, :, None]) < 0).sum(2)
    assert torch.equal(differing.flatten(2), counted.float())


def block_of(want: dict[str, Tensor], number: int) -> PairBlock:
    """The golden block, quantized; its two 1x1 convolutions stand in one."""
    given = {
        k.removeprefix(f"block{number}_param_"): v for k, v in want.items() if k.startswith(f"block{number}_param")
    }
    sizes = [int(want[f"block{number}_{name}"]) for name in ("in", "out", "stride")]
    block = PairBlock(*sizes)
    for path in ("conv1", "conv2"):
        setattr(block, path, QuantLayer(getattr(block, path), BinaryWeight(), RSign(sizes[0])))
    for name, parameter in official(block).items():
        parameter.data.copy_(joined(given, name).view(parameter.shape))
    for number_of_norm, norm in ((1, block.bn1), (2, block.bn2)):
        for name in ("running_mean", "running_var"):
            getattr(norm, name).copy_(joined(given, f"bn{number_of_norm}_{name}"))
    return block.train(bool(want[f"block{number}_training"]))


def official(block: PairBlock) -> dict[str, nn.Parameter]:
    """A block's parameters by the names of the golden file."""
    return {
        "move11_bias": block.conv1.input_quantizer.shift,
        "binary_3x3_weight": block.conv1.layer.weight,
        "bn1_weight": block.bn1.weight,
        "bn1_bias": block.bn1.bias,
        "move12_bias": block.act1.before,
        "prelu1_weight": block.act1.slope,
        "move13_bias": block.act1.after,
        "move21_bias": block.conv2.input_quantizer.shift,
        "binary_pw_weight": block.conv2.layer.weight,
        "bn2_weight": block.bn2.weight,
        "bn2_bias": block.bn2.bias,
        "move22_bias": block.act2.before,
        "prelu2_weight": block.act2.slope,
        "move23_bias": block.act2.after,
    }


def joined(given: dict[str, Tensor], name: str) -> Tensor:
    """An array of the golden file, or the two halves of a doubling one after the other."""
    if name in given:
        return given[name]
    halves = {"binary_pw_weight": "binary_pw_down{}_weight"}.get(name, name.replace("bn2", "bn2_{}"))
    return torch.cat([given[halves.format(half)] for half in (1, 2)])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_quantized_block_is_the_official_codes(want, number):
    block, x = block_of(want, number), want[f"block{number}_x"].clone().requires_grad_()
    y = block(x)
    y.backward(want[f"block{number}_grad_out"])
    close(y, want[f"block{number}_expected_y"], 1e-4)
    close(x.grad, want[f"block{number}_expected_grad_x"], 1e-4)
    prefix = f"block{number}_expected_grad_"
    expected = {key.removeprefix(prefix): value for key, value in want.items() if key.startswith(prefix)}
    for name, parameter in official(block).items():
        gradient = joined(expected, name)
        close(parameter.grad.view(gradient.shape), gradient, 1e-4)


def test_distillation_without_labels_is_the_distributional_loss_less_the_teachers_entropy(want):
    student = want["kd_student"].clone().requires_grad_()
    loss = softened_divergence(student, want["kd_teacher"], 1.0)
    loss.backward()
    close(loss + want["kd_expected_teacher_entropy"], want["kd_expected_loss"])
    close(student.grad, want["kd_expected_grad_student"])
    assert loss > 0
    assert softened_divergence(want["kd_teacher"], want["kd_teacher"], 1.0).abs() < 1e-6


def test_gradients_are_those_of_the_curve_that_the_paper_draws():
    u = torch.tensor([-3, -1, -0.999, -0.4, 0, 0.4, 0.999, 1, 3], dtype=torch.float64)
    x, shift = torch.randn(9, dtype=torch.float64), torch.randn((), dtype=torch.float64)
    x = (u - shift).view(1, 1, 9).requires_grad_()
    shift = shift.view(1).requires_grad_()
    grad = torch.randn(1, 1, 9, dtype=torch.float64)
    sign(x, shift).backward(grad)

    def curve(u: Tensor) -> Tensor:
        return torch.where(u < -1, -1, torch.where(u < 0, u * u + 2 * u, torch.where(u < 1, 2 * u - u * u, 1)))

    numeric = (curve(u + 1e-7) - curve(u - 1e-7)) / 2e-7 * grad.flatten()
    torch.testing.assert_close(x.grad.flatten(), numeric, rtol=0, atol=1e-6)
    torch.testing.assert_close(shift.grad, numeric.sum().view(1), rtol=0, atol=1e-6)
    assert not x.grad.flatten()[[0, 1, 7, 8]].round(decimals=12).any(), "beyond 1 nothing passes"


def test_zero_has_the_sign_one_in_training_in_evaluation_and_in_codes():
    quantizer, x = RSign(2), torch.tensor([[0.0, -0.5], [-0.0, -0.6]])
    quantizer.shift.data.copy_(torch.tensor([0.0, 0.5]))
    expected = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    for found in (quantizer.train()(x), quantizer.eval()(x), quantizer.codes(x)):
        assert torch.equal(found, expected)
    assert torch.equal(scaled_sign(torch.tensor([0.0, -0.0]), torch.tensor(2.0)), torch.tensor([2.0, 2.0]))


def test_the_scale_is_the_mean_size_and_gets_no_gradient():
    weight = (0.3 * torch.randn(4, 3, 3, 3, dtype=torch.float64)).requires_grad_()
    quantizer = BinaryWeight()
    quantizer.initialize(weight.detach())
    g = torch.randn_like(weight)
    rounded = quantizer(weight)
    rounded.backward(g)
    alpha = weight.detach().abs().mean((1, 2, 3)).view(-1, 1, 1, 1)
    torch.testing.assert_close(rounded.detach(), alpha * weight.detach().sign(), rtol=1e-6, atol=0)
    assert torch.equal(weight.grad, g * (weight.abs() <= 1))
    assert mean_size(torch.zeros(2, 3)).tolist() == pytest.approx([1e-8, 1e-8])


def test_quantizers_obey_the_laws():
    check_quantizer(RSign, idempotent=True)
    check_quantizer(BinaryWeight, for_weights=True)


def test_thresholds_other_than_zero_survive_being_written_down_and_round_alike():
    quantizer, x = RSign(), torch.randn(4, 5, 6, 6)
    quantizer.initialize(x)
    quantizer.shift.data.normal_()
    twin = build_from(describe(quantizer))
    twin.load_state_dict(quantizer.state_dict())
    assert torch.equal(twin(x), quantizer(x))
    assert torch.equal(quantizer.eval()(x), quantizer.grid().values(quantizer.codes(x)))
    assert torch.equal(copy.deepcopy(quantizer).double().codes(x.double()), quantizer.codes(x))


@pytest.mark.parametrize("padding", [0, 1])
def test_int64_arithmetic_gives_the_layer_with_its_thresholds_and_its_zero_padding(padding):
    layer = QuantLayer(nn.Conv2d(5, 6, 3, padding=padding, bias=False), BinaryWeight(), RSign())
    x = torch.randn(2, 5, 8, 8)
    layer.observe(x)
    layer.input_quantizer.shift.data.normal_()
    np.testing.assert_allclose(quantized_layer(layer, x), layer(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    integer = lower(nn.Sequential(layer), x)[0]
    assert integer.stream.zero_point == 1, "halfway between the codes 0 and 2, so that padding is exact"
    assert integer.bits == 1
    torch.testing.assert_close(integer(x), layer(x).detach())


def test_the_compiler_takes_a_training_step_in_one_piece_and_gets_the_same():
    torch.compiler.reset()
    layer = QuantLayer(nn.Conv2d(5, 6, 3), BinaryWeight(), RSign()).to(memory_format=torch.channels_last)
    x = torch.randn(3, 5, 8, 8).to(memory_format=torch.channels_last)
    layer.observe(x)
    twin, copied, x = copy.deepcopy(layer), x.clone().requires_grad_(), x.requires_grad_()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    g = torch.randn_like(layer(x))
    for given, run in ((x, layer), (copied, compiled)):
        run(given).backward(g)
    torch.testing.assert_close(copied.grad, x.grad)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_autocast_gives_signs_too():
    layer = QuantLayer(nn.Conv2d(5, 6, 3), BinaryWeight(), RSign())
    x = torch.randn(2, 5, 8, 8)
    layer.observe(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
    assert layer.input_quantizer(x.bfloat16()).unique().tolist() == [-1, 1]


def test_nothing_is_kept_for_the_backward_pass_but_what_came_in_and_thresholds():
    quantizer, x = RSign(5), torch.randn(3, 5, 8, 8, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        quantizer(x)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), quantizer.shift.data_ptr()}


@pytest.mark.parametrize(("options", "key"), [({"edge_input": MinMax()}, "edge_weight"), ({}, "edge_weight")])
def test_the_eight_bits_of_the_edges_are_refused_with_advice(options, key):
    with pytest.raises(UserError, match=rf"a sign has 1; give `{key}` another kind, or `edge_bits: null`"):
        Quantize(BinaryWeight(), RSign(), **options).prepare(small_network(), Stripes())


def test_the_input_of_an_edge_is_refused_with_advice_too():
    with pytest.raises(UserError, match="give `edge_input` another kind"):
        Quantize(BinaryWeight(), RSign(), edge_weight=MinMaxWeight()).prepare(small_network(), Stripes())


def small_network() -> ReActNet:
    return ReActNet([2, 2], [8, 12], classes=2)


def binarized(weight: BinaryWeight | None, edges: bool = True) -> Quantize:
    if not edges:
        return Quantize(weight, RSign(), edge_bits=None, keep=["*.shortcut"])
    rules = [Rule("*.shortcut", weight=MinMaxWeight(), input=MinMax())]
    return Quantize(weight, RSign(), edge_weight=MinMaxWeight(), edge_input=MinMax(), rules=rules)


def trained(edges: bool, epochs: int = 12) -> tuple[nn.Module, list[float]]:
    data, losses = Stripes(), []
    method = binarized(BinaryWeight(), edges)
    net = method.prepare(small_network(), data)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in data.train():
            loss = nn.functional.cross_entropy(net(data.normalize(batch.input)), batch.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return method.finish(net), losses


@pytest.mark.parametrize("edges", [True, False])
def test_a_binary_network_trains_and_both_files_say_what_it_says(tmp_path, edges):
    net, losses = trained(edges)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    data = Stripes()
    whole = Deployed(lower(net, data.normalize(data.example())), data.normalize, Classify(2)).eval()
    image = data.validation()[0].input
    binary = [layer for layer in integer_layers(whole).values() if layer.bits == 1]
    assert len(binary) == 4
    onnx.export(whole, data.example(), tmp_path / "model.onnx")
    openvino.export(whole, data.example(), tmp_path / "model.xml")
    answer = whole(image)
    torch.testing.assert_close(answer, net(data.normalize(image)).detach(), rtol=1e-2, atol=1e-2)
    for engine in (OnnxRuntime(tmp_path / "model.onnx"), OpenVINO(tmp_path / "model.xml")):
        torch.testing.assert_close(engine(image), answer, rtol=1e-3, atol=1e-3)
    convolutions = [made.kernel for made in engine.operations() if made.kind == "Convolution"]
    integers = sum("I8" in kernel for kernel in convolutions)
    assert integers == (6 if edges else 0), "OpenVINO looks for integers only where some quantizer is affine"


def test_a_binary_weight_takes_one_bit_in_the_file():
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *[nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64)])
    wide.extend([nn.Conv2d(64, 64, 3, bias=False), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64 * 4, 2)])
    data = Stripes()
    net = Quantize(BinaryWeight(), RSign(), edge_bits=None).prepare(wide.eval(), data)
    whole = Deployed(lower(net, data.normalize(data.example())), data.normalize, Classify(2)).eval()
    model, layers = build(whole, data.example()), integer_layers(whole)
    weights = sum(layer.codes.numel() for layer in layers.values())
    saved = model.ByteSize() - pack(model, layers).ByteSize()
    assert weights == 64 * 9 * (8 + 64)
    assert abs(saved - weights * 7 / 8) < 3000
