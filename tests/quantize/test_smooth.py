"""SmoothQuant: factors against brute force, and that the float network answers as before."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from rich.table import Table
from torch import Tensor, nn

from galago.errors import UserError
from galago.laws.trial import TinyImages, tiny_network
from galago.quantize.calibrated import Calibrated, CalibratedWeight
from galago.quantize.quantize import Quantize
from galago.quantize.smooth import Smooth, migration
from galago.testing import check_method


class Images(TinyImages):
    """The same, as large as a transformer's patches."""

    def _batches(self, epoch: int):
        batches = super()._batches(epoch)
        return [batch._replace(input=batch.input.repeat_interleave(4, 2).repeat_interleave(4, 3)) for batch in batches]


def transformer(pool: str = "token", depth: int = 2) -> nn.Module:
    """A tiny vision transformer whose norms have outliers."""
    torch.manual_seed(0)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=depth, num_heads=2, num_classes=3, global_pool=pool
    )
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.2)
            nn.init.normal_(module.bias, 0.0, 0.2)
            module.weight.data[5] = 30.0
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    return model.eval()


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).detach().abs().max() / second.detach().abs().max())


def test_factors_over_two_layers_are_the_brute_force(golden):
    want = {key.removeprefix("sq_"): value for key, value in golden("ptq").items() if key.startswith("sq_")}
    widest = torch.cat([want["w_a"], want["w_b"]]).abs().amax(0)
    sigma = migration(want["x"].abs().amax(0), widest, float(want["alpha"]))
    torch.testing.assert_close(sigma, want["expected_sigma"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_the_float_network_answers_as_before(pool, alpha):
    model, x = transformer(pool), torch.randn(4, 3, 32, 32)
    before, method = model(x), Smooth(alpha)
    after = method.prepare(model, Images())(x)
    assert difference(after, before) < 1e-5
    read = {row.norm: row.readers for row in method.rows()}
    assert read["blocks.0.norm1"] == "blocks.0.attn.qkv"
    assert read["blocks.1.norm2"] == "blocks.1.mlp.fc1"
    assert read["norm" if pool == "token" else "fc_norm"] == "head"
    assert not any(row.note for row in method.rows())
    assert all(row.after < row.before for row in method.rows())
    assert isinstance(method.summary(), Table)


def test_with_an_even_split_both_sides_are_as_large():
    """At alpha 1/2 the largest activation and the largest weight of a channel meet in the middle."""
    model, data = transformer(), Images()
    Smooth(0.5).prepare(model, data)
    given = []
    handle = model.blocks[0].norm1.register_forward_hook(lambda module, args, output: given.append(output))
    model(data.normalize(data.train()[0].input))
    handle.remove()
    activations = given[0].detach().abs().flatten(0, 1).amax(0)
    torch.testing.assert_close(activations, model.blocks[0].attn.qkv.weight.detach().abs().amax(0), rtol=1e-4, atol=0)


def test_convnext_is_smoothed_too():
    torch.manual_seed(0)
    model, x = timm.create_model("test_convnext", num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    before, method = model(x), Smooth()
    after = method.prepare(model, Images())(x)
    assert difference(after, before) < 1e-5
    assert any(row.readers.endswith("mlp.fc1") and not row.note for row in method.rows())


class Shared(nn.Module):
    """A norm that two linear layers read, one that a sum reads too, one without a gain, one whose channel is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.one, self.two = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 8, bias=False)
        self.summed, self.three = nn.LayerNorm(8), nn.Linear(8, 8)
        self.bare, self.four = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 8)
        self.out, self.head = nn.LayerNorm(8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :8]
        y = self.both(x)
        y = self.two(y) + self.one(y).mean()
        y = self.summed(y)
        y = self.three(y) + y
        return self.head(self.out(self.four(self.bare(y))))


def test_every_reader_takes_part_or_the_norm_stays():
    model, x = Shared(), torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        model.both.weight[3] = model.both.bias[3] = 0
        model.head.weight[:, 2] = 0
    before, untouched, method = model(x), copy.deepcopy(model), Smooth()
    model = method.prepare(model, TinyImages())
    assert difference(model(x), before) < 1e-5
    notes = {row.norm: (row.readers, row.note) for row in method.rows()}
    assert {*notes["both"][0].split(", ")} == {"one", "two"}
    assert "reads it too" in notes["summed"][1]
    assert "no gain" in notes["bare"][1]
    assert torch.equal(model.summed.weight, untouched.summed.weight)
    assert torch.equal(model.two.weight[:, 3], untouched.two.weight[:, 3])
    assert torch.equal(model.out.weight[2], untouched.out.weight[2])
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_quantized_activations_lose_far_less():
    errors, data = [], Images()
    x = data.normalize(data.validation()[0].input)
    for methods in ([], [Smooth()]):
        model = transformer()
        exact = model(x)
        for method in [*methods, Quantize(CalibratedWeight(8), Calibrated(4, "min_max"), edge_bits=None)]:
            model = method.prepare(model, data)
        errors.append(float((model.eval()(x) - exact).detach().norm()))
    assert errors[1] < 0.7 * errors[0]


def test_what_was_done_is_not_repeated_on_resume():
    method, model = Smooth(), transformer()
    method.prepare(model, Images())
    resumed = Smooth()
    resumed.load_state_dict(method.state_dict())
    before = copy.deepcopy(model.state_dict())
    resumed.prepare(model, Images())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert resumed.summary() is None


def test_it_obeys_the_laws():
    check_method(Smooth, make_model=lambda: transformer(depth=1), make_data=Images)


def test_without_a_layer_norm_nothing_happens_and_that_is_said():
    method = Smooth()
    method.prepare(tiny_network(), TinyImages())
    assert "nothing changed" in str(method.summary())


def test_impossible_settings_are_refused_in_plain_words():
    with pytest.raises(UserError, match="alpha is 2"):
        Smooth(alpha=2)
    with pytest.raises(UserError, match="batches is 0"):
        Smooth(batches=0)
    model = Quantize(CalibratedWeight(8)).prepare(tiny_network(), TinyImages())
    with pytest.raises(UserError, match="before Quantize"):
        Smooth().prepare(model, TinyImages())
