"""ANI: noise inside the network, as strong as the activations of the batch, so that attacks have no fixed target.

Yi Xiang Marcus Tan, Yuval Elovici, Alexander Binder, "Adaptive Noise Injection for Training Stochastic Student Networks
from Deterministic Teachers", ICPR 2020.

A trained network becomes a stochastic one: noise is added behind its BatchNorms, in training and in prediction, and its
strength follows the statistics of the batch. It starts from the weights of a network without noise, which teaches it,
so that accuracy is kept; what an attacker computes with one draw of the noise does not fit the next.

    ỹ = y + α s_c ε,   s_c² = population variance of channel c over batch and place, constant;   ε ~ N(0, 1)
    L = CE(z^s(x̃), q) + λ T² KL(p_T(z^t(x)) ‖ p_T(z^s(x̃))),   x̃ = x, or an attack on the student as it is now
    running statistics:   v ← 0.9 v + 0.1 s_c² in training,   s_c = √v

The loss is `galago.distill.distill.Distill` with `SoftTargets`; the teacher has no noise. With
`galago.augment.adversarial_view.AdversarialView` listed behind `Distill`, the student trains on attacked images and the
teacher still sees clean ones.

When: a network that someone may want to fool, with `galago.probes.adversarial` to see whether it helps: gradients of a
single draw flatter such a defense, so the probe averages over many. Costs a variance and random numbers a layer, and
clean accuracy, the more the larger α. List it behind `Quantize` and whatever mends what that rounds: noise comes before
the quantizer of an activation, and ranges are set again with noise.

What ships. `draws: 0`, the default, takes the noise out when training ends: one answer an image, a file as small and
fast as any, which `verify` compares in both engines; the robustness that is left is what training gave the weights.
`draws: 1` leaves it in, with running statistics, so that an answer does not depend on its batch; the files then draw
(ONNX: `RandomNormalLike`), `draws: n` averages the probabilities of n draws. Such files cannot be verified, as they
give another answer each time (OpenVINO's draws begin anew whenever it is loaded), and sums with noise are computed in
float. What is measured after each epoch has its noise in any case.

Usual setting: the paper's is unknown (its abstract is what was read). Here α = 0.1 (0.05 to 0.3), λ = 1, T = 1, SGD at
0.01, 30 epochs from the teacher's weights. Recipe: recipes/distill/noise_injection_resnet20_cifar10.yaml.

Chosen here, the paper being silent: all formulas. Where a channel has a single value the running statistics count, as
its variance would be 0. With timm's BatchNormAct noise goes between normalization and activation. α that is learned
layer by layer is not offered: without attacks in training nothing keeps it from falling to 0. `adaptive: false` is the
usual baseline, Gaussian noise of one size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.draws import MeanOfDraws
from galago.errors import UserError
from galago.layers import Wrapper, flow
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized
from galago.quantize.wrapping import (
    Place,
    channels_given,
    chosen,
    quantized,
    require_quantizers_first,
    set_ranges_again,
    unwrapped,
    wrap,
)
from galago.schedule import Constant, Schedule

KEPT = 0.9  # of the running variance in a training step


def channel_variance(y: Tensor) -> Tensor:
    """`s_c²`, C numbers, constant, of N×C×H×W or N×C: divided by N H W.

    >>> channel_variance(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    tensor([1., 0.])
    """
    return y.detach().var([0, *range(2, y.ndim)], correction=0)


def inject(y: Tensor, spread: Tensor, noise: Tensor, alpha: Tensor | float) -> Tensor:
    """`ỹ`, of the shape of y.

    Args:
        y: N×C×H×W or N×C.
        spread: s, C numbers.
        noise: ε, of the shape of y, or N×C×1×1.
        alpha: how strong it is.
    """
    return y + alpha * spread.view(1, -1, *[1] * (y.ndim - 2)) * noise


def draw(y: Tensor, per_channel: bool, uniform: bool) -> Tensor:
    """`ε`, of mean 0 and variance 1.

    Args:
        y: N×C×H×W or N×C, gives shape, type and device.
        per_channel: one number an image and channel, N×C×1×1, instead of one an element.
        uniform: between ±√3 instead of normal.
    """
    like = y[:, :, *[slice(1)] * (y.ndim - 2)] if per_channel else y
    return (2 * torch.rand_like(like) - 1) * 3**0.5 if uniform else torch.randn_like(like)


class Noisy(Wrapper):
    """A layer whose output gets noise, in training and in evaluation mode.

    Args:
        layer: gives N×C×H×W or N×C.
        channels: C.
        per_channel: one draw an image and channel.
        uniform: noise that is uniform instead of normal.
        running: strength by the running statistics instead of the batch's.
        adaptive: False for the same strength everywhere, whatever the activations.
    """

    alpha: Tensor
    variance: Tensor

    def __init__(
        self,
        layer: nn.Module,
        channels: int,
        per_channel: bool = False,
        uniform: bool = False,
        running: bool = False,
        adaptive: bool = True,
    ) -> None:
        super().__init__(layer)
        self.channels, self.per_channel, self.uniform = channels, per_channel, uniform
        self.running, self.adaptive = running, adaptive
        self.register_buffer("alpha", torch.zeros(()))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        y: Tensor = self.layer(*args, **kwargs)
        return inject(y, self.spread(y), draw(y, self.per_channel, self.uniform), self.alpha).to(y.dtype)

    def spread(self, y: Tensor) -> Tensor:
        """`s`, C numbers; in training mode the running statistics follow y first."""
        if not self.adaptive:
            return torch.ones_like(self.variance)
        if (self.training or not self.running) and y.numel() > y.shape[1]:
            variance = channel_variance(y).to(self.variance.dtype)
            if self.training:
                self.variance.lerp_(variance, 1 - KEPT)
            if not self.running:
                return variance.sqrt()
        return self.variance.sqrt()


class NoiseInjection(Method):
    """Adds noise behind layers, as strong as what they give out; list it behind `Quantize`.

    Args:
        alpha: α, the noise's strength in units of each channel's standard deviation.
        layers: patterns of paths or type names of the layers behind which noise is added.
        schedule: a factor on α over the training.
        running: strength by running statistics, not by those of the batch, in training too.
        per_channel: one draw an image and channel instead of one an element.
        uniform: noise that is uniform instead of normal.
        adaptive: False for noise of standard deviation α whatever the activations, the usual baseline.
        draws: how many answers the finished network averages; 0 ships it without noise.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        layers: Sequence[str] = ("BatchNorm*",),
        schedule: Schedule = Constant(),  # noqa: B008 - has no state
        running: bool = False,
        per_channel: bool = False,
        uniform: bool = False,
        adaptive: bool = True,
        draws: int = 0,
    ) -> None:
        super().__init__()
        if alpha < 0:
            raise UserError(f"NoiseInjection: alpha is {alpha:g}; give 0 or more, usually 0.05 to 0.3")
        if draws < 0:
            raise UserError(f"NoiseInjection: draws is {draws}; give 0 to ship without noise, or how many to average")
        if not layers:
            raise UserError("NoiseInjection: layers is empty; name at least one, such as BatchNorm*")
        self.alpha, self.layers, self.schedule, self.draws = alpha, list(layers), schedule, draws
        self.running, self.per_channel, self.uniform, self.adaptive = running, per_channel, uniform, adaptive
        self._names: list[str] = []
        self._quantized = False

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Wraps the layers.

        Raises:
            UserError: a pattern matches nothing, or what it matches gives no channels.
        """
        device = device_of(model)
        image = normalized(data, data.example(), device)
        with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
            channels = channels_given(flow(model, image), chosen(model, self.layers))
        self._names, self._quantized = [place.name for place in channels], bool(quantized(model))

        def noisy(place: Place, layer: nn.Module) -> Noisy:
            return Noisy(layer, channels[place], self.per_channel, self.uniform, self.running, self.adaptive)

        model = wrap(model, list(channels), noisy)
        set_alpha(model, self.alpha)
        set_ranges_again(model, data)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        require_quantizers_first(model, self._quantized, "NoiseInjection")
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        set_alpha(inner.model, self.alpha * self.schedule(inner.progress))
        return inner(batch)

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the noise out, or makes the network one that draws by itself."""
        require_quantizers_first(model, self._quantized, "NoiseInjection")
        if not self.draws:
            return unwrapped(model, Noisy)
        set_alpha(model, self.alpha * self.schedule(1.0))
        for noisy in noisy_parts(model):
            noisy.running = True
        return model if self.draws == 1 else MeanOfDraws(model, self.draws)

    def summary(self) -> str | None:
        """Behind which layers there is noise."""
        return f"NoiseInjection: noise behind {', '.join(self._names)}" if self._names else None


def noisy_parts(model: nn.Module) -> list[Noisy]:
    """Every layer that gets noise."""
    return [module for module in model.modules() if isinstance(module, Noisy)]


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Makes the noise this strong in every layer."""
    for noisy in noisy_parts(model):
        noisy.alpha.fill_(alpha)
