"""Where noise goes in a network that may be wrapped, shared or quantized already."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, clone, identical, tiny_network
from galago.layers import Wrapper, find, flow
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.lsq import LSQ, LSQWeight
from galago.quantize.min_max import MinMax, MinMaxWeight
from galago.quantize.quantize import Quantize
from galago.quantize.stat_assist import StatAssist
from galago.quantize.wrapping import (
    channels_given,
    chosen,
    places,
    quantized,
    require_quantizers_first,
    set_ranges_again,
    unwrapped,
    wrap,
)


class Louder(Wrapper):
    """Ten times what a layer gives."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = 10 * self.layer(x)
        return output


def quantized_network() -> nn.Module:
    return Quantize(LSQWeight(4), LSQ(4), stream=MinMax(8)).prepare(tiny_network(), TinyImages())


def test_layers_have_the_same_names_whatever_is_wrapped() -> None:
    plain, wrapped = tiny_network(), quantized_network()
    assert quantized(wrapped)
    assert not quantized(plain)
    names = [place.name for place in places(plain)]
    assert [place.name for place in places(wrapped)] == names == [name for name, _ in plain.named_modules()]
    for place in places(wrapped):
        assert type(place.layer) is type(plain.get_submodule(place.name))


def test_patterns_mean_layers_by_path_or_type() -> None:
    network = quantized_network()
    named = [place.name for place in chosen(network, ["BatchNorm*"])]
    assert named == [name for name, part in tiny_network().named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert [place.name for place in chosen(network, ["block.bn", "stem"])] == ["stem", "block.bn"]


def test_a_pattern_that_means_nothing_is_refused_with_what_is_near() -> None:
    with pytest.raises(UserError, match=r"'block\.bm' matches no layer.*did you mean block\.bn"):
        chosen(tiny_network(), ["block.bm"])


def test_within_normalization_with_an_activation_the_place_between_the_two_is_meant() -> None:
    network = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    names = [place.name for place in chosen(network, ["BatchNorm*"])]
    assert "bn1.drop" in names
    assert "bn1" not in names


def test_a_wrapper_stands_inside_the_quantizer_of_what_a_layer_gives() -> None:
    network = quantized_network()
    network = wrap(network, chosen(network, ["block.bn"]), lambda place, layer: Louder(layer))
    stream = find(network, "block.bn")
    assert isinstance(stream, QuantOutput)
    assert isinstance(stream.layer, Louder)
    network = wrap(network, chosen(network, ["block.conv"]), lambda place, layer: Louder(layer))
    loud = find(network, "block.conv")
    assert isinstance(loud, Louder)
    assert isinstance(loud.layer, QuantLayer)


def test_a_shared_layer_gets_one_wrapper_under_all_its_names() -> None:
    shared = nn.ReLU()
    network = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), shared))
    network = wrap(network, chosen(network, ["ReLU"]), lambda place, layer: Louder(layer))
    assert network[0] is network[1][1]
    assert isinstance(network[0], Louder)


def test_layers_within_layers_are_wrapped_both_and_the_network_itself_too() -> None:
    network = nn.Sequential(nn.Sequential(nn.Identity()))
    network = wrap(network, places(network), lambda place, layer: Louder(layer))
    assert network(torch.ones(1)).item() == 1000
    plain = unwrapped(network, Louder)
    assert [type(part) for part in plain.modules()] == [nn.Sequential, nn.Sequential, nn.Identity]


def test_a_new_wrapper_is_in_its_layers_mode() -> None:
    network = nn.Sequential(nn.ReLU().eval(), nn.Identity().train())
    network = wrap(network, places(network)[1:], lambda place, layer: Louder(layer))
    assert [part.training for part in network] == [False, True]


def test_layers_that_do_not_run_are_left_out_and_those_without_channels_refused() -> None:
    network = tiny_network().eval()
    network.idle = nn.BatchNorm2d(3)
    seen = flow(network, torch.zeros(1, 3, 8, 8))
    found = channels_given(seen, chosen(network, ["BatchNorm*", "head"]))
    assert {place.name: channels for place, channels in found.items()} == {
        "stem.1": 5,
        "block.first.1": 5,
        "block.bn": 5,
        "down.1": 10,
        "head": 3,
    }
    with pytest.raises(UserError, match="no layer to which noise is to be added runs"):
        channels_given(seen, chosen(network, ["idle"]))
    tokens = nn.Sequential(nn.Flatten(2), nn.LayerNorm(64)).eval()
    with pytest.raises(UserError, match="1 gives 1×3×64, to which no noise"):
        channels_given(flow(tokens, torch.zeros(1, 3, 8, 8)), chosen(tokens, ["LayerNorm"]))


def test_ranges_are_set_again_as_the_network_computes_now_and_nothing_else_changes() -> None:
    network = Quantize(MinMaxWeight(8), MinMax(8), stream=MinMax(8)).prepare(tiny_network(), TinyImages()).eval()
    network = wrap(network, chosen(network, ["BatchNorm*"]), lambda place, layer: Louder(layer))
    ranges = {id(b) for part in quantized(network) for b in quantizer_of(part).buffers()}
    before = {name: b.clone() for name, b in network.state_dict(keep_vars=True).items() if id(b) not in ranges}
    scales = [quantizer_of(part).grid().scale.clone() for part in quantized(network)]
    random = torch.get_rng_state()
    set_ranges_again(network, TinyImages())
    after = network.state_dict()
    assert identical(before, {name: after[name] for name in before})
    assert torch.equal(random, torch.get_rng_state())
    assert not any(part.training for part in network.modules())
    grown = [float(quantizer_of(p).grid().scale / s) for p, s in zip(quantized(network), scales, strict=True)]
    assert grown[0] == 1  # the image's own range
    assert all(factor > 5 for factor in grown[1:])


def quantizer_of(part: QuantLayer | QuantOutput) -> nn.Module:
    found = part.output_quantizer if isinstance(part, QuantOutput) else part.input_quantizer
    assert found is not None
    return found


def test_quantizers_at_rest_keep_their_ranges() -> None:
    network = StatAssist(epochs=1).prepare(quantized_network(), TinyImages())
    before = clone(network.state_dict())
    set_ranges_again(network, TinyImages())
    assert identical(before, network.state_dict())
    assert not any(part.observing for part in quantized(network))


def test_quantizing_behind_noise_is_refused() -> None:
    require_quantizers_first(tiny_network(), False, "Noise")
    require_quantizers_first(quantized_network(), True, "Noise")
    with pytest.raises(UserError, match="Noise is listed before Quantize"):
        require_quantizers_first(quantized_network(), False, "Noise")
