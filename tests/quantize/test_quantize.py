"""`Quantize` over real networks with random weights, and over small ones whose right answer is known."""

from __future__ import annotations

from copy import deepcopy
from io import StringIO

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from torch import Tensor, nn

from galago.batch import Batch
from galago.data import Data, Normalize
from galago.errors import UserError
from galago.quantize.inventory import table
from galago.quantize.layer import QuantLayer, QuantOutput
from galago.quantize.quantize import Quantize, Rule
from galago.quantize.quantizer import Grid, Quantizer, integer_range


class Rounder(Quantizer):
    """The plainest quantizer: the largest magnitude decides, rounding is straight-through."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.zeros(()))

    def initialize(self, x: Tensor) -> None:
        self.scale.copy_(x.detach().abs().amax() / integer_range(self.bits, signed=True)[1])

    def forward(self, x: Tensor) -> Tensor:
        low, high = integer_range(self.bits, signed=True)
        scale = self.scale.clamp_min(1e-8)
        return x + ((x / scale).round().clamp(low, high) * scale - x).detach()

    def grid(self) -> Grid:
        return Grid(self.scale, torch.zeros(()), *integer_range(self.bits, signed=True))


class Images(Data):
    """Random images, the same whenever they are asked for."""

    def __init__(self, size: int = 32, channels: int = 3) -> None:
        self.batch_size, self.classes, self.shape = 2, ("cat", "dog"), (2, channels, size, size)
        self.normalize = Normalize([0.5] * channels, [0.25] * channels)

    def train(self, epoch: int = 0, start: int = 0) -> list[Batch]:
        numbers = torch.Generator().manual_seed(epoch)
        images = [torch.randint(0, 256, self.shape, dtype=torch.uint8, generator=numbers) for _ in range(3)]
        return [Batch(image, torch.eye(2)) for image in images[start:]]

    def validation(self) -> list[Batch]:
        return self.train()

    def example(self) -> Tensor:
        return self.train()[0].input[:1]

    def seen(self) -> Tensor:
        """A batch as a network sees it."""
        return self.normalize(self.train()[0].input)


def quantize(bits: int = 4, **arguments) -> Quantize:
    return Quantize(Rounder(bits), Rounder(bits), stream=Rounder(8), **arguments)


def paths(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Where wrappers stand, as paths of the network before it was quantized."""
    found = [path for path, module in model.named_modules() if isinstance(module, kind)]
    return [path.replace(".layer.", ".").removesuffix(".layer") for path in found]


# (network, pixels, how many layers, how many streams)
NETWORKS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(), 32, 21, 21),
    "torchvision mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 32, 53, 21),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 32, 54, 41),
    "torchvision shufflenet_v2_x0_5": (lambda: torchvision.models.shufflenet_v2_x0_5(), 32, 57, 37),
    "torchvision densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16), 32, 11, 8),
    "torchvision squeezenet1_1": (lambda: torchvision.models.squeezenet1_1(), 64, 26, 28),
    "timm resnet18": (lambda: timm.create_model("resnet18"), 32, 21, 21),
    "timm mobilenetv3_small_100": (lambda: timm.create_model("mobilenetv3_small_100"), 32, 54, 42),
    "timm efficientnet_lite0": (lambda: timm.create_model("efficientnet_lite0"), 32, 50, 19),
    "timm tf_efficientnet_lite0, padding as in TensorFlow": (
        lambda: timm.create_model("tf_efficientnet_lite0"),
        32,
        50,
        19,
    ),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto"), 32, 41, 56),
    "timm deit_tiny": (lambda: timm.create_model("deit_tiny_patch16_224", img_size=32), 32, 50, 1),
    "timm regnetx_002": (lambda: timm.create_model("regnetx_002"), 32, 45, 31),
    "timm ghostnet_100": (lambda: timm.create_model("ghostnet_100"), 32, 96, 123),
    "timm repvgg_a0": (lambda: timm.create_model("repvgg_a0"), 32, 45, 100),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_real_networks_are_quantized_as_they_are_written(name):
    make, size, layers, streams = NETWORKS[name]
    torch.manual_seed(0)
    model, data = make().eval(), Images(size)
    parameters = {path: id(p) for path, p in model.named_parameters()}
    model = quantize().prepare(model, data)
    assert len(paths(model, QuantLayer)) == layers
    assert len(paths(model, QuantOutput)) == streams
    assert {id(p) for p in model.parameters()} == set(parameters.values())
    with torch.no_grad():
        output = model(data.seen())
        copy = deepcopy(model)
        copy.load_state_dict(model.state_dict())
        assert output.isfinite().all()
        assert torch.equal(copy(data.seen()), output)
    model.train()(data.seen()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", [torchvision.models.resnet18, lambda: timm.create_model("resnet18")])
def test_a_residual_network_has_a_stream_wherever_a_tensor_is_added_or_forks(make):
    model = quantize().prepare(make(), Images())
    found = set(paths(model, QuantOutput))
    forks = {"bn1.act", "bn1"} & found | {"relu", "act1"} & found  # of the stem
    downsamples = {f"layer{stage}.0.downsample.1" for stage in (2, 3, 4)}
    second = {f"layer{stage}.{block}.bn2" for stage in (1, 2, 3, 4) for block in (0, 1)}
    blocks = {p for p in found if p.count(".") == 1 or p.endswith(".act2")} - forks - second
    assert len(forks) == 1
    assert downsamples <= found
    assert second <= found
    assert len(blocks) == 8
    assert found == forks | downsamples | second | blocks | {"maxpool"}


class Functional(nn.Module):
    """A network as people write them: functional activations and additions, two convolutions on one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(Residual(), Residual())
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)))
        x = F.relu(self.left(x)) + self.right(x)
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


def test_streams_stand_before_a_functional_relu_and_after_the_block_that_gives_out_a_functional_sum():
    model, data = Functional(), Images(8)
    rows = quantize().check(model, data)
    streams = {row.path for row in rows if row.stream == "Rounder 8"}
    assert streams == {"stem", "body.0.norm", "body.0", "body.1.norm", "body.1", "left", "right"}


def test_a_sum_that_no_module_gives_out_is_reported():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x) + self.b(x)
            return self.c(x) + x

    rows = quantize().check(Net(), Images(8))
    assert [(row.kind, row.note) for row in rows if row.stays_float] == [
        ("addition", "float: no module gives out its result")
    ]


def test_what_the_network_gives_out_is_never_a_stream():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    )
    model = quantize().prepare(net, Images(8))
    assert paths(model, QuantLayer) == ["0", "3"]
    assert paths(model, QuantOutput) == []


def test_a_result_that_one_layer_alone_reads_needs_no_stream_but_one_in_front_of_hard_swish_does():
    def net(activation: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), activation, nn.Conv2d(4, 2, 1))

    assert paths(quantize().prepare(net(nn.ReLU6()), Images(8)), QuantOutput) == []
    assert paths(quantize().prepare(net(nn.Hardswish()), Images(8)), QuantOutput) == ["1"]


def test_a_stream_stands_in_front_of_a_layer_that_compares_its_input_instead_of_rounding_it():
    class Comparer(Rounder):
        def codes(self, x: Tensor) -> Tensor:
            return super().codes(x)

    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    comparing = Quantize(Rounder(4), Comparer(4), edge_input=Rounder(8), stream=Rounder(8))
    assert paths(comparing.prepare(deepcopy(net), Images(8)), QuantOutput) == ["2"]
    assert paths(quantize().prepare(net, Images(8)), QuantOutput) == []


def test_without_a_stream_quantizer_only_layers_are_wrapped():
    model = Quantize(Rounder(4), Rounder(4)).prepare(Functional(), Images(8))
    assert paths(model, QuantOutput) == []
    assert len(paths(model, QuantLayer)) == 6


def test_weights_alone_can_be_quantized_and_then_nothing_is_a_stream():
    model = Quantize(weight=Rounder(4), stream=Rounder(8)).prepare(Functional(), Images(8))
    assert paths(model, QuantOutput) == []
    assert all(m.input_quantizer is None for m in model.modules() if isinstance(m, QuantLayer))


def bits(model: nn.Module) -> dict[str, tuple[int | None, int | None]]:
    """Weight and input bits of every quantized layer."""
    return {
        path.replace(".layer", ""): (
            m.weight_quantizer and m.weight_quantizer.bits,
            m.input_quantizer and m.input_quantizer.bits,
        )
        for path, m in model.named_modules()
        if isinstance(m, QuantLayer)
    }


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(256, 2),
    )


def test_first_and_last_layer_have_bits_of_their_own_or_stay_float():
    prepared = [quantize(2, edge_bits=edge).prepare(plain(), Images(8)) for edge in (8, 2, None)]
    assert [bits(model) for model in prepared] == [
        {"0": (8, 8), "2": (2, 2), "4": (2, 2), "6": (8, 8)},
        {"0": (2, 2), "2": (2, 2), "4": (2, 2), "6": (2, 2)},
        {"2": (2, 2), "4": (2, 2)},
    ]


def test_first_and_last_layer_may_have_quantizers_of_another_kind():
    class Other(Rounder):
        pass

    method = quantize(2, edge_bits=None, edge_weight=Other(5), edge_input=Other(6))
    model = method.prepare(plain(), Images(8))
    assert bits(model) == {"0": (5, 6), "2": (2, 2), "4": (2, 2), "6": (5, 6)}
    assert isinstance(model[6].weight_quantizer, Other)
    assert not isinstance(model[4].weight_quantizer, Other)


def test_the_first_rule_that_matches_decides_and_goes_before_the_edges():
    rules = [Rule("0", weight=Rounder(3), input=Rounder(5)), Rule("4"), Rule("Conv2d", bits=6), Rule("2", bits=1)]
    assert bits(quantize(2, rules=rules).prepare(plain(), Images(8))) == {"0": (3, 5), "2": (6, 6), "6": (8, 8)}


def test_a_rule_with_one_quantizer_of_its_own_takes_the_other_from_the_common_ones():
    rules = [Rule("2", bits=7, weight=Rounder(3)), Rule("4", weight=Rounder(3))]
    found = bits(quantize(2, rules=rules).prepare(plain(), Images(8)))
    assert found["2"] == (3, 7)
    assert found["4"] == (3, None)


def test_a_layer_with_a_quantized_weight_alone_is_said_to_compute_in_float():
    rows = quantize(2, rules=[Rule("2", weight=Rounder(3))]).check(plain(), Images(8))
    assert [(row.path, row.note) for row in rows if row.stays_float] == [("2", "float: only its weight is quantized")]


def test_keep_means_everything_inside_by_path_or_type_streams_too():
    model = quantize(keep=["body.1", "Linear"]).prepare(Functional(), Images(8))
    assert set(bits(model)) == {"stem", "body.0.conv", "left", "right"}
    assert not any(path.startswith("body.1") for path in paths(model, QuantOutput))


def test_layers_never_share_quantizers_nor_change_the_prototype():
    method = quantize(2)
    model = method.prepare(plain(), Images(8))
    quantizers = [m for m in model.modules() if isinstance(m, Rounder)]
    assert len({id(q) for q in quantizers}) == len(quantizers) == 8
    assert method.weight.bits == 2
    assert method.weight.scale == 0
    assert list(method.parameters()) == []
    assert method.state_dict() == {}


@pytest.mark.parametrize("arguments", [{"keep": ["boddy.1"]}, {"rules": [Rule("boddy.1", bits=4)]}])
def test_a_pattern_that_matches_nothing_names_what_it_may_have_meant(arguments):
    with pytest.raises(UserError, match=r"'boddy\.1' matches no layer.*did you mean body\.1"):
        quantize(**arguments).prepare(Functional(), Images(8))


def test_a_network_cannot_be_quantized_twice():
    model = quantize().prepare(plain(), Images(8))
    with pytest.raises(UserError, match="0 is quantized already"):
        quantize().prepare(model, Images(8))


def test_a_stream_must_keep_the_size_of_values():
    normalized = Rounder(8)
    normalized.normalized = True
    with pytest.raises(UserError, match="stream: Rounder changes the size of values"):
        Quantize(Rounder(4), Rounder(4), stream=normalized)


class Odd(nn.Module):
    """Layers that cannot simply be computed with another weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.twice = nn.Conv2d(8, 8, 1)
        self.never = nn.Linear(8, 8)
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.tied.weight
        self.standard = Standardized(8, 8, 1)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.standard(self.twice(self.twice(self.stem(x))))
        x = self.normed(self.other(self.tied(x.flatten(2).transpose(1, 2))))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x).mean(1))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, (self.weight - self.weight.mean((1, 2, 3), keepdim=True)), self.bias)


def test_layers_whose_stored_weight_is_not_what_they_compute_with_stay_float_and_say_why():
    rows = quantize().check(Odd(), Images(8))
    why = {row.path: row.note for row in rows if row.weight == "float"}
    assert "runs 2 times" in why["twice"]
    assert "does not run" in why["never"]
    assert "shared with other" in why["tied"]
    assert "shared with tied" in why["other"]
    assert "computes another weight" in why["standard"]
    assert "computed from other parameters" in why["normed"]
    assert "read by attention directly" in why["attention.out_proj"]
    assert {row.path for row in rows if row.weight == "Rounder 8"} == {"stem", "head"}
    assert ("norm", "layer normalization") in {(row.path, row.kind) for row in rows}


def test_a_network_with_such_layers_still_trains_when_the_others_are_quantized():
    model = quantize().prepare(Odd(), Images(8))
    assert model(Images(8).seen()).isfinite().all()


def test_check_changes_nothing_and_tells_the_same_as_prepare():
    model, data, method = timm.create_model("mobilenetv3_small_050"), Images(), quantize()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = str(model)
    rows = method.check(model, data)
    assert str(model) == text
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    method.prepare(model, data)
    assert list(method.rows()) == rows


def test_check_names_what_an_attention_block_computes_in_float():
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1)
    rows = quantize().check(model, Images())
    found = {(row.path, row.kind) for row in rows if row.stays_float}
    assert {
        ("blocks.0.norm1", "layer normalization"),
        ("blocks.0.attn", "attention product"),
        ("blocks.0.mlp.act", "GELU"),
        ("blocks.0", "addition"),
    } <= found


def test_a_batch_normalization_that_cannot_be_folded_is_named():
    rows = quantize().check(torchvision.models.DenseNet(8, (1, 1), 16), Images())
    named = {row.path for row in rows if row.kind == "batch normalization"}
    assert "features.denseblock1.denselayer1.norm1" in named  # it follows a concatenation
    assert "features.denseblock1.denselayer1.norm2" not in named  # it follows a convolution


def test_the_table_shows_every_row():
    rows = quantize().check(Functional(), Images(8))
    console = Console(width=200, record=True, file=StringIO())
    console.print(table(rows))
    text = console.export_text()
    assert all(row.path in text for row in rows)


def test_prepare_leaves_statistics_modes_and_the_random_state_alone():
    model, data = torchvision.models.mobilenet_v2(), Images()
    model.features[3].eval()
    modes = {module: module.training for module in model.modules()}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    prepared = quantize().prepare(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module, training in modes.items())
    left = {
        name.replace(".layer.", "."): buffer for name, buffer in prepared.named_buffers() if "quantizer" not in name
    }
    assert all(torch.equal(left[name], buffer) for name, buffer in statistics.items())


def test_preparing_the_same_network_again_gives_the_same_ranges_whatever_the_random_state():
    start = timm.create_model("mobilenetv3_small_050", drop_rate=0.5)
    first, second = deepcopy(start), deepcopy(start)
    torch.manual_seed(1)
    first = quantize().prepare(first, Images())
    torch.manual_seed(2)
    second = quantize().prepare(second, Images())
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_ranges_are_set_on_as_many_batches_as_asked():
    data = Images(8)
    largest = [data.normalize(batch.input).abs().amax() for batch in data.train()]
    first = quantize(edge_bits=4, batches=3).prepare(nn.Sequential(nn.Conv2d(3, 2, 1)), data)[0]
    assert first.input_quantizer.scale == torch.stack(largest).amax() / 7


def test_a_layer_known_under_two_names_is_quantized_under_both():
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.features = nn.ModuleDict({"block": nn.Sequential(self.conv, nn.ReLU(), nn.Conv2d(4, 2, 1))})

        def forward(self, x: Tensor) -> Tensor:
            return self.features["block"](x)

    model = quantize().prepare(Alias(), Images(8))
    assert isinstance(model.conv, QuantLayer)
    assert model.conv is model.features["block"][0]


def test_a_layer_that_the_network_holds_in_a_plain_list_is_an_error_that_names_it():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.steps = [self.conv]

        def forward(self, x: Tensor) -> Tensor:
            return self.steps[0](x)

    with pytest.raises(UserError, match=r"did not use conv.*keep"):
        quantize().prepare(Hidden(), Images(8))


def test_a_network_that_is_a_single_layer_becomes_the_wrapper_itself():
    model = quantize().prepare(nn.Conv2d(3, 2, 1), Images(8))
    assert isinstance(model, QuantLayer)


def test_channels_last_stays_channels_last():
    model = torchvision.models.resnet18().to(memory_format=torch.channels_last)
    model = quantize().prepare(model, Images()).eval()
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert model(Images().seen().to(memory_format=torch.channels_last)).isfinite().all()


def test_finish_keeps_the_quantizers_and_stops_training_mode():
    method = quantize()
    model = method.finish(method.prepare(plain(), Images(8)))
    assert not any(module.training for module in model.modules())
    assert len(paths(model, QuantLayer)) == 4
