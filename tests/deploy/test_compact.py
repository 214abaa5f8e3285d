"""A compact file says what the long one says, with the same kernels, and is found to be smaller."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

from galago.deploy.compact import compact
from galago.deploy.onnx import build, export, integer_layers, lowered
from galago.deploy.pack import pack
from galago.deploy.runtime import OnnxRuntime, OpenVINO
from galago.models.resnet import resnet20
from galago.models.tiny import tiny
from galago.probe import Deployed
from galago.quantize.ewgs import EWGS, EWGSWeight
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.n2uq import N2UQ, N2UQWeight
from galago.quantize.quantize import Quantize
from galago.tasks.classify import Classify
from samples import Stripes

PAIRS = {
    "LSQ, 2 bits": (lambda: LSQWeight(2), lambda: LSQ(2)),
    "LSQ, 8 bits": (lambda: LSQWeight(8), lambda: LSQ(8)),
    "EWGS, 4 bits, another scale behind the codes": (lambda: EWGSWeight(4), lambda: EWGS(4)),
    "EWGS, 1 bit": (lambda: EWGSWeight(1), lambda: EWGS(1)),
    "N2UQ, codes from comparisons": (lambda: N2UQWeight(2), lambda: N2UQ(2)),
}


def packed(weight, inputs, network) -> tuple[onnx.ModelProto, Tensor]:
    data = Stripes()
    method = Quantize(weight(), inputs(), edge_weight=MinMaxWeight(), edge_input=MinMax(), stream=MinMax())
    quantized = method.finish(method.prepare(network, data))
    whole = lowered(Deployed(quantized, data.normalize, Classify(2)), data.example())
    return pack(build(whole, data.example()), integer_layers(whole)), data.validation()[0].input


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", PAIRS)
def test_answers_codes_and_kernels_are_the_same(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, image = packed(*PAIRS[name], tiny(2, channels=3, width=8))
    before = model.SerializeToString()
    small = compact(model)
    assert model.SerializeToString() == before
    first, second = saved(model, tmp_path / "long.onnx"), saved(small, tmp_path / "short.onnx")
    assert second.stat().st_size < first.stat().st_size
    long, short = OnnxRuntime(first), OnnxRuntime(second)
    assert torch.equal(long(image), short(image))
    kinds = [sorted(operation.kind for operation in file.operations()) for file in (long, short)]
    assert kinds[0] == kinds[1]
    codes = [file.look(image)[1] for file in (long, short)]
    assert codes[0].keys() == codes[1].keys()
    assert all(torch.equal(codes[0][path], codes[1][path]) for path in codes[0])
    torch.testing.assert_close(OpenVINO(second)(image), OpenVINO(first)(image))


def test_operations_of_layers_keep_their_names() -> None:
    model, _ = packed(*PAIRS["LSQ, 2 bits"], tiny(2, channels=3, width=8))
    for kind in ("Conv", "Gemm", "Add"):
        names = [[node.name for node in one.graph.node if node.op_type == kind] for one in (model, compact(model))]
        assert names[0] == names[1]


def test_a_bias_whose_scale_is_another_stays_as_it_is() -> None:
    model, _ = packed(*PAIRS["LSQ, 2 bits"], tiny(2, channels=3, width=8))
    biases = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) == 2]
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == biases[0].input[1])
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 2, scale.name))
    calls = [node for node in compact(model).graph.node if node.op_type == "Bias"]
    assert len(calls) == len(biases) - 1


@pytest.mark.parametrize(("bits", "share"), [(4, 0.14), (2, 0.08)])
def test_resnet20s_file_is_proportional_to_its_bits(bits: int, share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, network = Stripes(), resnet20(2).eval()
    plain = export(Deployed(network, data.normalize, Classify(2)), data.example(), tmp_path / "float.onnx")
    edges = {"edge_weight": MinMaxWeight(), "edge_input": MinMax(), "stream": MinMax()}
    quantized = Quantize(LSQWeight(bits), LSQ(bits), **edges).prepare(network, data).eval()
    small = export(Deployed(quantized, data.normalize, Classify(2)), data.example(), tmp_path / "small.onnx")
    assert small.stat().st_size <= share * plain.stat().st_size
