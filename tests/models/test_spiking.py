"""The spiking network: step by step, its encodings, and that it is exported, verified and quantized like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from galago.batch import Batch
from galago.datasets.digits import Digits
from galago.deploy import onnx, openvino
from galago.deploy.runtime import OnnxRuntime
from galago.deploy.verify import compare
from galago.errors import UserError
from galago.layers import tap
from galago.models.lif import LIF
from galago.models.spiking import RateCode, SpikingNet, spiking_net
from galago.probe import Deployed
from galago.probes.cost import cost_table
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax
from galago.quantize.quantize import Quantize
from galago.recipe import Parts
from galago.spec import build, describe
from galago.tasks.classify import Classify


def small(steps: int = 4, rate_coded: bool = False, widths: tuple[int, ...] = (4, 6)) -> SpikingNet:
    return SpikingNet(size=8, widths=widths, steps=steps, rate_coded=rate_coded)


def digits(rate_coded: bool) -> Digits:
    return Digits(batch_size=64, mean=[0.0], std=[1.0]) if rate_coded else Digits(batch_size=64)


def trained(network: nn.Module, data: Digits, epochs: int = 5) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    network.train()
    for epoch in range(epochs):
        for batch in data.train(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(data.normalize(batch.input)), batch.target).backward()
            optimizer.step()
    return network.eval()


def accuracy(network: nn.Module, data: Digits) -> float:
    with torch.no_grad():
        right = [network(data.normalize(b.input)).argmax(1) == b.target.argmax(1) for b in data.test()]
    return float(torch.cat(right).float().mean())


def test_parameters_are_as_the_page_says() -> None:
    assert sum(parameter.numel() for parameter in spiking_net().parameters()) == 20_548


def step_by_step(network: SpikingNet, image: Tensor) -> Tensor:
    """Scores of a pass in which every neuron keeps its membrane from one step to the next."""
    states: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    counts = sums = torch.zeros(())

    def live(neurons: LIF, current: Tensor) -> Tensor:
        membrane, spike = states.get(neurons, (torch.zeros_like(current), torch.zeros_like(current)))
        membrane = network.leak * membrane * (1 - spike) + current
        spike = (membrane >= network.threshold).float()
        states[neurons] = (membrane, spike)
        return spike

    for t in range(network.steps):
        x = image if network.encoding is None else network.encoding(image)[..., t]
        for block in network.blocks:
            x = block.pool(live(block.neurons, block.bn(block.conv(x))))
        counts = counts + live(network.output, network.bn(network.head(x.flatten(1))))
        sums = sums + states[network.output][0]
    mean = sums / network.steps
    return network.scale / network.steps * (counts + 0.01 * mean / (1 + mean.abs()))


@pytest.mark.parametrize("rate_coded", [False, True])
def test_scores_are_those_of_the_network_run_step_by_step(rate_coded: bool) -> None:
    data = digits(rate_coded)
    network = trained(small(5, rate_coded), data, epochs=1)
    image = data.normalize(next(iter(data.test())).input[:16])
    with torch.no_grad():
        torch.testing.assert_close(network(image), step_by_step(network, image))


def test_nothing_is_kept_from_one_batch_to_the_next() -> None:
    network, image = small().eval(), torch.randn(4, 1, 8, 8)
    first = network(image)
    network(torch.randn(4, 1, 8, 8))
    assert torch.equal(network(image), first)
    torch.testing.assert_close(network(image.flip(0)).flip(0), first)


def test_with_constant_current_the_first_convolution_runs_once() -> None:
    table = {row.path: row.macs for row in cost_table(small(steps=4), torch.zeros(1, 1, 8, 8))}
    assert table == {"blocks.0.conv": 64 * 9 * 4, "blocks.1.conv": 4 * 16 * 9 * 4 * 6, "head": 4 * 24 * 10}
    rate_coded = {row.path: row.macs for row in cost_table(small(4, True), torch.zeros(1, 1, 8, 8))}
    assert rate_coded["blocks.0.conv"] == 4 * table["blocks.0.conv"]


def test_a_layer_of_neurons_gives_spikes_with_time_last() -> None:
    network = small(steps=7)
    with tap(network, "output") as output, tap(network, "blocks.1.neurons") as hidden:
        network(torch.randn(3, 1, 8, 8))
    assert output.value.shape == (3, 10, 7)
    assert hidden.value.shape == (3, 6, 4, 4, 7)
    assert ((hidden.value == 0) | (hidden.value == 1)).all()


def test_a_pixel_spikes_as_often_as_it_is_bright_and_the_same_in_every_network() -> None:
    grey = torch.arange(256).view(-1, 1, 1, 1).expand(-1, 1, 8, 8) / 255
    spikes = RateCode(1, 8, 64)(grey)
    assert spikes.shape == (256, 1, 8, 8, 64)
    rate = spikes.flatten(1).mean(1)
    assert rate[0] == 0
    assert rate[-1] == 1
    assert (rate - grey[:, 0, 0, 0]).abs().max() < 0.03
    assert torch.equal(spikes, small(64, True).encoding(grey))
    assert torch.equal(spikes[..., :10], RateCode(1, 8, 10)(grey))


def test_spikes_of_a_rate_code_are_independent_over_time_and_pixels() -> None:
    spikes = RateCode(1, 16, 32)(torch.full((1, 1, 16, 16), 0.5))[0, 0]
    over_time, over_pixels = torch.corrcoef(spikes.flatten(0, 1).T), torch.corrcoef(spikes.flatten(0, 1))
    for found, samples in ((over_time, 256), (over_pixels, 32)):
        found = found - torch.eye(len(found))
        assert found.square().mean().sqrt() < 1.2 / samples**0.5


def test_no_8_bit_image_meets_a_level_of_the_rate_code() -> None:
    levels = 255 * RateCode(3, 16, 16).levels
    assert ((levels % 1 - 0.5).abs() < 1e-3).all()
    assert levels.min() > 0
    assert levels.max() < 255


@pytest.mark.parametrize("rate_coded", [False, True])
def test_it_learns_real_digits_in_seconds(rate_coded: bool) -> None:
    data = digits(rate_coded)
    assert accuracy(trained(small(8, rate_coded, widths=(8, 16)), data, epochs=8), data) > 0.8


def compared(network: nn.Module, data: Digits, folder: Path) -> dict[str, Any]:
    deployed = Deployed(network, data.normalize, Classify(10)).eval()
    files = {
        "onnxruntime": onnx.export(deployed, data.example(), folder / "model.onnx"),
        "openvino": openvino.export(deployed, data.example(), folder / "model.xml")[0],
    }
    parts = Parts(Classify(10), data, [])
    return compare(deployed, files, parts, images=300)


def test_both_engines_give_what_a_rate_coded_network_gives(tmp_path: Path) -> None:
    data = digits(rate_coded=True)
    outcome = compared(trained(small(3, True, widths=(6,)), data, epochs=3), data, tmp_path)
    assert outcome["passed"]
    for name in ("integer", "onnxruntime", "openvino"):
        assert outcome[name]["largest_difference"] < 1e-4


def test_a_file_takes_any_number_of_images(tmp_path: Path) -> None:
    data = digits(rate_coded=False)
    deployed = Deployed(trained(small(2, widths=(6,)), data, 1), data.normalize, Classify(10)).eval()
    file = OnnxRuntime(onnx.export(deployed, data.example(), tmp_path / "model.onnx"))
    image = next(iter(data.test())).input
    for number in (1, 3, 50):
        torch.testing.assert_close(file(image[:number]), deployed(image[:number]))


def test_convolutions_are_quantized_and_the_neurons_stay_float_with_a_reason(tmp_path: Path) -> None:
    data = digits(False)
    float_network = trained(small(2), data, epochs=3)
    method = Quantize(LSQWeight(8), LSQ(8), stream=MinMax(8))
    network = method.prepare(float_network, data)
    kinds = {row.path: row for row in method.rows()}
    assert all(kinds[path].weight == "LSQWeight 8" for path in ("blocks.0.conv", "blocks.1.conv", "head"))
    assert any(row.path == "blocks.0.neurons" and row.stays_float for row in method.rows())
    outcome = compared(method.finish(trained(network, data, epochs=1)), data, tmp_path)
    assert outcome["passed"]
    assert outcome["onnxruntime"]["layers"]


def test_a_compiled_network_gives_the_same_spikes_and_gradients() -> None:
    network, image = small(2, widths=(4,)), torch.randn(4, 1, 8, 8)
    found = []
    for forward in (network, torch.compile(network, backend="aot_eager")):
        network.zero_grad()
        scores = forward(image)
        scores.square().sum().backward()
        found.append([scores.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_a_network_can_be_written_down_and_rebuilt() -> None:
    network = SpikingNet(3, 2, 8, (4,), 5, True, 0.8, 0.9, 5.0, 8.0)
    twin = build(describe(network))
    assert describe(twin) == describe(network)
    twin.load_state_dict(network.state_dict())
    image = torch.rand(2, 2, 8, 8)
    assert torch.equal(twin.eval()(image), network.eval()(image))


def test_weights_are_read_from_a_file(tmp_path: Path) -> None:
    network = small()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    twin = spiking_net(size=8, widths=(4, 6), steps=4, weights=tmp_path / "weights.pt")
    assert torch.equal(twin.head.weight, network.head.weight)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"made for images of 1×8×8, these are 3×16×16; set its channels and size"):
        small()(torch.zeros(1, 3, 16, 16))


def test_widths_and_steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="4 widths halve an image of 8 pixels"):
        SpikingNet(size=8, widths=(2, 2, 2, 2))
    with pytest.raises(UserError, match="0 widths"):
        SpikingNet(widths=())
    with pytest.raises(UserError, match="steps is 0"):
        SpikingNet(steps=0)


def test_half_precision_layers_between_neurons_train() -> None:
    network = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = Classify(10).losses(network(torch.randn(4, 1, 8, 8)), Batch(torch.zeros(4), torch.eye(10)[:4]))
    loss["cross_entropy"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
