"""Weights in as many bits as they have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from galago.deploy.onnx import build, integer_layers, lowered
from galago.deploy.pack import levels_of, pack, pack_bits, parts, stored, unpack_bits, unpacker
from galago.deploy.runtime import OnnxRuntime
from galago.quantize.min_max import MinMaxWeight
from integers import Odd, PerChannel, Ranged, deployed, images, quantize

GOLDEN = Path(__file__).parent.parent / "golden" / "quantization" / "integer_deployment.npz"


def test_the_order_in_a_byte_is_onnxs() -> None:
    golden = np.load(GOLDEN)
    assert np.array_equal(pack_bits(golden["int4_codes"], 4), golden["int4_expected_bytes"])
    assert np.array_equal(pack_bits(golden["uint2_codes"], 2), golden["uint2_expected_bytes"])


def test_single_bits_stand_as_in_little_endian_words() -> None:
    golden = np.load(GOLDEN)
    bits = golden["pack_wide_bits"]  # 70 channels a row, in words of 64
    padded = np.pad(bits, ((0, 0), (0, 128 - bits.shape[1])))
    packed = np.stack([pack_bits(row, 1) for row in padded]).view("<u8")
    assert np.array_equal(packed, golden["pack_wide_expected_words"])


@given(st.sampled_from([1, 2, 4, 8]), st.lists(st.integers(0, 255), max_size=40))
def test_unpacking_undoes_packing(bits: int, numbers: list[int]) -> None:
    levels = np.array(numbers, np.uint8) & np.uint8(2**bits - 1)
    packed = pack_bits(levels, bits)
    assert packed.size == -(-len(levels) * bits // 8)
    assert np.array_equal(unpack_bits(packed, bits, len(levels)), levels)


def test_every_width_is_made_of_powers_of_two() -> None:
    for bits in range(1, 9):
        assert sum(width for width, _ in parts(bits)) == bits
        assert sum((2**width - 1) << place for width, place in parts(bits)) == 2**bits - 1


WIDE = 60  # channels: enough that weights outweigh everything else in the file


def network(weight, gains: bool) -> nn.Module:
    """A wide network with flipped, widened and dead channels."""
    built = nn.Sequential(nn.Conv2d(3, WIDE, 3), nn.BatchNorm2d(WIDE), nn.ReLU(), nn.Conv2d(WIDE, WIDE, 3, bias=False))
    built.append(nn.BatchNorm2d(WIDE)).extend([nn.ReLU(), nn.Flatten(), nn.Linear(WIDE * 16, 5)])
    if gains:
        built[4].weight.data[:3] = torch.tensor([-1.0, 0.0, 0.5])
    return quantize(built.eval(), torch.randn(4, 3, 8, 8), weight, Ranged, Ranged)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("gains", [False, True])
def test_a_packed_file_says_what_the_unpacked_one_says(bits: int, gains: bool, tmp_path: Path) -> None:
    weight = Odd if bits in (1, 3, 7) else PerChannel if bits < 8 else MinMaxWeight  # which leaves -128 out
    whole, image = deployed(network(lambda: weight(bits), gains)), images(3, 8)
    integer = lowered(whole, image)
    model = build(integer, image)
    onnx.save(model, tmp_path / "plain.onnx")
    onnx.save(pack(model, integer_layers(integer)), tmp_path / "packed.onnx")
    packed, plain = OnnxRuntime(tmp_path / "packed.onnx"), OnnxRuntime(tmp_path / "plain.onnx")
    assert torch.equal(packed(image), plain(image))
    assert [made.kind for made in packed.operations()] == [made.kind for made in plain.operations()]
    assert sum(made.kind == "QLinearConv" for made in packed.operations()) == 2
    weights = sum(layer.codes.numel() for layer in integer_layers(integer).values())
    saved = (tmp_path / "plain.onnx").stat().st_size - (tmp_path / "packed.onnx").stat().st_size
    assert abs(saved - weights * (8 - bits) / 8) <= 3000 * (bits < 8)  # nodes and names, whatever the size


def test_levels_and_their_rule_give_the_codes_back() -> None:
    whole = lowered(deployed(network(lambda: PerChannel(4), gains=True)), images(1, 8))
    for layer in integer_layers(whole).values():
        levels, step, base = levels_of(layer)
        assert levels.min() >= 0
        assert levels.max() <= 15
        assert step.min() >= 0, "a flipped channel counts from the other end"
        assert np.array_equal(levels * step + base, layer.codes.numpy())


def test_the_given_model_is_left_alone_and_the_packed_one_is_sound() -> None:
    whole, image = lowered(deployed(network(lambda: PerChannel(2), gains=False)), images(1, 8)), images(1, 8)
    model = build(whole, image)
    before = model.SerializeToString()
    packed = pack(model, integer_layers(whole))
    assert model.SerializeToString() == before
    onnx.checker.check_model(packed, full_check=True)
    assert {node.domain for function in packed.functions for node in function.node} == {""}
    assert (
        {node.op_type for node in packed.graph.node if node.domain} == {f.name for f in packed.functions} == {"Unpack2"}
    )


def test_a_step_and_a_base_of_one_value_are_still_two_inputs() -> None:
    layer = next(iter(onnx_layers(lambda: PerChannel(4)).values()))
    layer.codes, layer.step, layer.base = torch.full_like(layer.codes, 2), layer.step * 0 + 1, layer.base * 0 + 1
    assert [array.size for array in stored("w", layer).values()][-2:] == [1, 1]
    assert len(stored("w", layer)) == len(unpacker(4).input)


def onnx_layers(weight):
    return integer_layers(lowered(deployed(network(weight, gains=False)), images(1, 8)))
