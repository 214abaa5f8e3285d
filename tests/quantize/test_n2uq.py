"""N2UQ against the official code's numbers, the surrogate's finite differences, and what the paper says it can do."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from onnx import load
from torch import nn

from galago.deploy import onnx, openvino
from galago.deploy.inspect import inspect_file
from galago.deploy.integer import lower
from galago.deploy.runtime import OnnxRuntime, OpenVINO
from galago.errors import UserError
from galago.probe import Deployed
from galago.quantize.layer import QuantLayer
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.n2uq import N2UQ, N2UQWeight, count_exceeded, ends, lengths, threshold_round, thresholds
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from galago.testing import check_quantizer
from samples import SmallNet, Stripes

PARAMETERS = ("start", "a", "beta1", "beta2")


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(
        found, expected.to(found.dtype), rtol=0, atol=tolerance * max(1.0, expected.abs().max().item())
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("start", ["default", "random"])
def test_codes_thresholds_and_every_gradient_are_the_official_codes(golden, bits, start):
    key = f"ltq_n{bits}_{start}_"
    want = {name.removeprefix(key): value for name, value in golden("n2uq").items() if name.startswith(key)}
    x = want["x"].clone().requires_grad_()
    given = [want[name].reshape(want[name].shape if name == "a" else ()).clone() for name in PARAMETERS]
    given = [parameter.requires_grad_() for parameter in given]
    y = threshold_round(x, *given)
    y.backward(want["grad_out"])
    close(y.detach(), want["expected_y"])
    close(thresholds(given[0], given[1]).detach(), want["expected_thresholds"])
    codes = count_exceeded((x * given[2]).detach(), thresholds(given[0], given[1]).detach())
    assert torch.equal(codes.to(torch.int8), want["expected_code"])
    close(x.grad, want["expected_grad_x"])
    for name, parameter in zip(PARAMETERS, given, strict=True):
        close(parameter.grad.reshape(-1), want[f"expected_grad_{name}"].reshape(-1))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_are_the_official_codes(golden, bits):
    key = f"weight_n{bits}_"
    want = {name.removeprefix(key): value for name, value in golden("n2uq").items() if name.startswith(key)}
    conv = nn.Conv2d(5, 4, 3, padding=1, bias=False)
    conv.weight.data.copy_(want["weight"])
    layer = QuantLayer(conv, N2UQWeight(bits))
    x = want["x"].clone().requires_grad_()
    y = layer(x)
    y.backward(want["grad_out"])
    quantizer = layer.weight_quantizer
    close(quantizer.scale, want["expected_scale"])
    steps = 2**bits - 1
    assert torch.equal(((quantizer.codes(conv.weight) + steps) / 2).to(torch.int8), want["expected_code"])
    close(y.detach(), want["expected_y"])
    close(x.grad, want["expected_grad_x"])
    close(conv.weight.grad, want["expected_grad_weight_quantized"])
    public = conv.weight.grad / quantizer.scale.view(-1, 1, 1, 1)  # the public rule, which Adam makes the same
    close(public, want["expected_grad_weight_public"], 1e-4)


def test_depth_wise_weights_are_the_official_codes(golden):
    want = golden("n2uq")
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    conv.weight.data.copy_(want["dw_weight"])
    close(QuantLayer(conv, N2UQWeight(int(want["dw_bits"])))(want["dw_x"]).detach(), want["dw_expected_y"])


def surrogate(x, start, segments, gain, scale):
    """h(z), in which gradients are taken, by interpolation between the segments' ends."""
    edges = ends(start, segments)
    low, span = edges[:-1].view(1, -1), lengths(segments).view(1, -1)
    rise = ((x[:, None] * gain - low) / span).clamp(0, 1)
    return scale * (2 / len(segments)) * rise.sum(1)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_gradients_are_the_finite_differences_of_the_surrogate(steps):
    """All but that in scale, which has the hard value."""
    x = torch.linspace(-0.7, 3.1, 301, dtype=torch.float64)
    given = [
        torch.tensor(0.13, dtype=torch.float64),
        0.2 + torch.rand(steps, dtype=torch.float64),
        torch.tensor(1.2, dtype=torch.float64),
        torch.tensor(0.8, dtype=torch.float64),
    ]
    g = torch.randn_like(x)
    ours = [tensor.clone().requires_grad_() for tensor in (x, *given)]
    threshold_round(*ours).backward(g)
    around = 1e-6

    def change(which, place):
        def at(moved):
            changed = [tensor.clone() for tensor in (x, *given)]
            changed[which].view(-1)[place] += moved
            return (surrogate(*changed) * g).sum()

        return (at(around) - at(-around)) / (2 * around)

    for which in (0, 1, 2, 3):
        numeric = torch.stack([change(which, place) for place in range(ours[which].numel())])
        torch.testing.assert_close(ours[which].grad.reshape(-1), numeric, rtol=1e-4, atol=1e-5)


def test_the_start_of_the_paper_is_the_uniform_quantizer_with_a_clipped_gradient():
    x = torch.linspace(-1, 3, 401).requires_grad_()
    y = N2UQ(2, fit=False)(x)
    step = 2 / 3
    inner = ((x / step) % 1 - 0.5).abs() > 1e-4
    assert torch.allclose(y[inner], (x.clamp(0, 2) / step).round()[inner] * step, atol=1e-6)
    y.sum().backward()
    inside = (x > 1e-4) & (x < 2 - 1e-4)
    outside = (x < -1e-4) | (x > 2 + 1e-4)
    assert torch.allclose(x.grad[inside], torch.ones(()), atol=1e-5)
    assert (x.grad[outside] == 0).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_rise_with_the_input_and_levels_are_equidistant(bits):
    quantizer = N2UQ(bits)
    quantizer.initialize(torch.randn(500))
    quantizer.segments.data.mul_(torch.rand(quantizer.steps) + 0.2)
    x = torch.linspace(-3, 5, 2000)
    codes = quantizer.codes(x)
    assert (codes.diff() >= 0).all()
    assert codes.unique().tolist() == list(range(2**bits))
    assert torch.equal(quantizer.eval()(x), quantizer.grid().values(codes))


def test_thresholds_are_found_again_which_a_straight_through_estimator_cannot():
    wanted = (torch.tensor(0.1), torch.tensor([0.3, 0.5, 1.1]), torch.tensor(1.0), torch.tensor(1.0))
    student = N2UQ(2, fit=False)
    optimizer = torch.optim.Adam([student.start, student.segments], lr=0.02)
    steps = 1500
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = 2.2 * torch.rand(512, generator=generator)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / steps)
        optimizer.zero_grad()
        (student(x) - threshold_round(x, *wanted)).square().mean().backward()
        optimizer.step()
    assert (thresholds(student.start, student.segments) - torch.tensor([0.25, 0.65, 1.45])).abs().max() < 3e-3
    x = 2.2 * torch.rand(20000, generator=generator)
    assert (student(x) == threshold_round(x, *wanted)).float().mean() > 0.995


@pytest.mark.parametrize(("bits", "least"), [(2, 0.99), (3, 0.99), (4, 0.985)])
def test_weights_use_their_codes_about_equally(bits, least):
    for weight, expected in ((torch.rand(4, 50000) * 2 - 1, 0.998), (torch.randn(4, 50000), least)):
        quantizer = N2UQWeight(bits)
        quantizer.initialize(weight)
        shares = torch.bincount(((quantizer.codes(weight) + 2**bits) / 2).long().flatten()) / weight.numel()
        entropy = -(shares * shares.log2()).sum().item()
        assert entropy > expected * bits


def test_one_bit_is_the_sign_times_the_mean_size():
    weight = torch.randn(3, 40)
    quantizer = N2UQWeight(1)
    quantizer.initialize(weight)
    assert torch.allclose(quantizer(weight), weight.sign() * weight.abs().mean(1, keepdim=True))


def test_the_gradient_beyond_the_outermost_levels_can_be_cut():
    weight = torch.randn(3, 40).requires_grad_()
    quantizer = N2UQWeight(2, clip_gradient=True)
    quantizer.initialize(weight)
    quantizer(weight).sum().backward()
    assert torch.equal(weight.grad != 0, weight.abs() <= quantizer.scale.view(-1, 1))


def test_the_start_follows_the_data_and_the_number_of_segments_the_bits():
    small, large = N2UQ(2), N2UQ(2)
    x = torch.randn(1000)
    small.bits = 3
    small.initialize(x)
    large.initialize(100 * x)
    assert small.segments.numel() == 7
    assert large.gain.item() == pytest.approx(small.gain.item() / 100, rel=1e-4)
    clipped = (large.codes(100 * x) == large.steps).float().mean()
    assert 0.001 < clipped < 0.05
    dead = N2UQ(2)
    dead.initialize(torch.zeros(10))
    assert math.isfinite(dead.gain.item())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_inputs_and_weights_obey_the_laws(bits):
    check_quantizer(lambda: N2UQ(bits))
    check_quantizer(lambda: N2UQWeight(bits), for_weights=True)


@pytest.mark.parametrize("kind", [N2UQ, N2UQWeight])
def test_more_bits_than_the_paper_has_are_refused(kind):
    with pytest.raises(UserError, match="must be 1 to 4"):
        kind(5)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_network_trains_and_its_files_say_what_it_says(tmp_path, bits):
    data = Stripes()
    method = Quantize(N2UQWeight(bits), N2UQ(bits), edge_bits=None)
    net = method.prepare(SmallNet(), data)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        for batch in data.train():
            loss = nn.functional.cross_entropy(net(data.normalize(batch.input)), batch.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    net = method.finish(net)
    task = Classify(2)
    deployed = Deployed(lower(net, data.normalize(data.example())), data.normalize, task).eval()
    image = data.validation()[0].input
    path = onnx.export(deployed, data.example(), tmp_path / "model.onnx")
    torch.testing.assert_close(OnnxRuntime(path)(image), deployed(image), rtol=1e-4, atol=1e-4)
    openvino.export(deployed, data.example(), tmp_path / "model.xml")
    torch.testing.assert_close(OpenVINO(tmp_path / "model.xml")(image), deployed(image), rtol=1e-4, atol=1e-4)
    kinds = Counter(node.op_type for node in load(path).graph.node)
    assert kinds["Greater"] % (2**bits - 1) == 0 < kinds["Greater"]  # comparisons, not what the compiler is given
    trained = net(data.normalize(image))
    torch.testing.assert_close(deployed(image), trained.detach(), rtol=1e-2, atol=1e-2)


def test_with_streams_a_convolution_computes_in_integers_although_its_result_is_compared(tmp_path):
    data = Stripes()
    method = Quantize(N2UQWeight(2), N2UQ(2), edge_weight=MinMaxWeight(), edge_input=MinMax(), stream=MinMax())
    blocks = [nn.Sequential(nn.Conv2d(n, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8, 8)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    net = method.finish(method.prepare(net, data))
    deployed = Deployed(lower(net, data.normalize(data.example())), data.normalize, Classify(2)).eval()
    path = onnx.export(deployed, data.example(), tmp_path / "model.onnx")
    rows = [row for row in inspect_file(path) if row.engine == "onnxruntime" and "Conv" in row.operation]
    assert [row.integer for row in rows] == [True] * 3
