"""The ONNX file: what it takes and gives, and what ONNX Runtime makes of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from galago.deploy.onnx import build, export, lowered
from galago.deploy.runtime import Artifact, OnnxRuntime
from galago.errors import UserError
from integers import Exported, Interval, Odd, PerChannel, Ranged, Signed, Zoo, deployed, images, quantize, shaken


def kinds(artifact: Artifact) -> Counter[str]:
    return Counter(operation.kind for operation in artifact.operations())


def test_every_layer_runs_as_integers(zoo: Exported) -> None:
    found = kinds(OnnxRuntime(zoo.onnx))
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (5, 1, 1)
    assert found["QLinearGlobalAveragePool"] == 1
    assert not found.keys() & {"Conv", "FusedConv", "Gemm", "Add", "Relu"}


def test_the_interface_is_raw_images_in_and_two_outputs(zoo: Exported) -> None:
    model = onnx.load(zoo.onnx)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [21]
    (image,) = model.graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert image.type.tensor_type.shape.dim[0].dim_param
    assert [output.name for output in model.graph.output] == ["output", "decoded"]


def test_the_file_says_nothing_of_the_machine_that_wrote_it(zoo: Exported) -> None:
    content = zoo.onnx.read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parents[2]).encode() not in content


def test_nodes_and_codes_are_named_after_their_layers(zoo: Exported) -> None:
    graph = onnx.load(zoo.onnx).graph
    named = [node for node in graph.node if node.name]  # calls of the file's own functions have no names
    nodes = {node.name: node for node in named}
    assert len(nodes) == len(named)
    assert {node.op_type for node in named} >= {"Conv", "Gemm", "Add"}
    for path in ("stem", "depth", "point", "group", "last"):
        assert nodes[f"{path}.layer/Conv"]
    assert nodes["fc.layer/Gemm"]
    notes = {entry.key: entry.value for entry in onnx.load(zoo.onnx).metadata_props}
    elsewhere = json.loads(notes["galago.streams"])
    values = {name for node in graph.node for name in node.output}
    assert all(elsewhere.get(path, f"{path}/codes") in values for path in zoo.codes(images(1)))
    assert "stem.stream" not in elsewhere


@pytest.mark.parametrize("count", [1, 3, 17])
def test_any_batch_size_runs(zoo: Exported, count: int) -> None:
    image = images(count)
    artifact = OnnxRuntime(zoo.onnx)
    one_by_one = torch.cat([artifact(image[i : i + 1]) for i in range(count)])
    assert torch.allclose(artifact(image), one_by_one, atol=1e-5)


def test_decoded_is_what_the_task_makes_of_the_output(zoo: Exported) -> None:
    answer = OnnxRuntime(zoo.onnx).run(images(3))
    assert torch.allclose(answer.decoded, answer.output.softmax(1), atol=1e-6)


def test_a_float_image_gives_the_same_answer(zoo: Exported, tmp_path: Path) -> None:
    image = images(4)
    export(zoo.trained, image[:1], tmp_path / "float.onnx", float_image=True)
    artifact = OnnxRuntime(tmp_path / "float.onnx")
    assert torch.allclose(artifact(image.float() / 255), OnnxRuntime(zoo.onnx)(image), atol=1e-5)
    assert torch.equal(artifact(image), artifact(image.float() / 255))


def test_a_network_without_quantizers_exports_as_it_is(tmp_path: Path) -> None:
    whole, image = deployed(shaken(Zoo())), images(4)
    export(whole, image[:1], tmp_path / "float.onnx")
    with torch.no_grad():
        assert torch.allclose(OnnxRuntime(tmp_path / "float.onnx")(image), whole(image), atol=1e-4)


def test_facts_about_the_model_are_kept(zoo: Exported, tmp_path: Path) -> None:
    export(zoo.trained, images(1), tmp_path / "about.onnx", about={"classes": "cat, dog"})
    notes = {entry.key: entry.value for entry in onnx.load(tmp_path / "about.onnx").metadata_props}
    assert notes["classes"] == "cat, dog"


def chain(activation: nn.Module, weight, given, x: Tensor) -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    network.extend([activation, nn.Conv2d(8, 5, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    return quantize(shaken(network), x, weight, given, Ranged)


@pytest.mark.parametrize(
    ("activation", "weight", "given"),
    [
        (nn.ReLU(), Odd, lambda: Interval(2)),
        (nn.ReLU6(), PerChannel, lambda: Interval(8)),
        (nn.Hardtanh(-0.2, 0.7), PerChannel, lambda: Signed(8)),
        (nn.Hardtanh(-0.2, 0.7), PerChannel, lambda: Interval(4, offset=-0.1)),
        (nn.Identity(), PerChannel, lambda: Interval(8)),
        (nn.ReLU(), PerChannel, lambda: Signed(4)),
        (nn.ReLU6(), PerChannel, lambda: Ranged(3)),
    ],
)
def test_what_stands_before_a_quantizer_goes_into_limits_and_bias(
    activation: nn.Module, weight, given, tmp_path: Path
) -> None:
    image = images(16)
    whole = deployed(chain(activation, weight, given, torch.randn(4, 3, 12, 12)))
    export(whole, image[:1], tmp_path / "chain.onnx")
    artifact = OnnxRuntime(tmp_path / "chain.onnx")
    assert kinds(artifact)["QLinearConv"] == 2  # all but the last, whose output stays float
    kept = {node.name for node in onnx.load(tmp_path / "chain.onnx").graph.node if node.op_type in ("Relu", "Sub")}
    assert kept <= {"normalize/Sub", "0.stream/Sub"}  # there is no bias before the first layer
    output, found = artifact.look(image)
    integer = Exported(whole, lowered(whole, image), tmp_path, tmp_path)
    for path, codes in integer.codes(image).items():
        steps = (codes.int() - found[path].int()).abs()
        assert (steps == 0).float().mean() >= 0.99, path
    with torch.no_grad():
        expected = integer.integer(image)
    assert (output - expected).abs().max() <= 0.1 * expected.abs().max()


def test_transposed_convolutions_and_tokens_export(tmp_path: Path) -> None:
    class Upsampled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.head = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.up(x).flatten(2).transpose(1, 2)
            return self.head(torch.relu(self.mix(tokens)).mean(1))

    network, x, image = Upsampled(), torch.randn(4, 3, 6, 6), images(4, 6)
    quantize(network, x, PerChannel, lambda: Ranged(8), Ranged)
    whole = deployed(network)
    export(whole, image[:1], tmp_path / "up.onnx")
    with torch.no_grad():
        expected = lowered(whole, image)(image)
    artifact = OnnxRuntime(tmp_path / "up.onnx")
    assert torch.allclose(artifact(image), expected, atol=2e-3 * float(expected.abs().max()))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Flatten(), Choosy()), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))


class Choosy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_named() -> None:
    with pytest.raises(UserError, match=r"body\.1: cannot be exported"):
        build(deployed(Branching()), images(1, 2))


class Unknown(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvalsh(x[:, 0] + x[:, 0].mT)[:, :5]


def test_an_operation_without_an_onnx_form_is_named() -> None:
    with pytest.raises(UserError, match="eigh"):
        build(deployed(Unknown()), images(1, 8))


def test_streams_that_encode_alike_are_all_found(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.left(x) + self.right(x)).mean((2, 3))

    network, image = Twins(), images(2)
    whole = deployed(quantize(network, torch.randn(2, 3, 12, 12), PerChannel, Ranged, Ranged))
    export(whole, image[:1], tmp_path / "twins.onnx")
    _, codes = OnnxRuntime(tmp_path / "twins.onnx").look(image)
    assert codes.keys() == {"left.stream", "right.stream"}
    assert torch.equal(codes["left.stream"], codes["right.stream"])


@pytest.mark.parametrize(("ratio", "quantizers"), [(1.0, 2), (1.5, 3)])
def test_codes_are_not_made_again_with_the_scale_that_they_have(ratio: float, quantizers: int, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3), nn.Flatten())
    image = images(4)
    whole = deployed(quantize(network, torch.randn(4, 3, 12, 12), PerChannel, Ranged, Ranged, ("1",)))
    stream, reader = network[1].output_quantizer, network[2].input_quantizer
    reader.scale.data, reader.zero.data = stream.scale.data * ratio, stream.zero.data.clone()
    export(whole, image[:1], tmp_path / "model.onnx", packed=False)
    made = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert made.count("QuantizeLinear") == quantizers
    output, codes = OnnxRuntime(tmp_path / "model.onnx").look(image)
    torch.testing.assert_close(output, lowered(whole, image[:1])(image), rtol=1e-3, atol=1e-3)
    assert codes.keys() == {"0.stream", "1.stream", "2.stream"}


def test_the_same_network_always_gives_the_same_file(zoo: Exported, tmp_path: Path) -> None:
    export(zoo.trained, images(1), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == zoo.onnx.read_bytes()
