"""PNI: noise on the weights whose strength is learned; the baseline of `galago.distill.noise_injection`.

Zhezhi He, Adnan Siraj Rakin, Deliang Fan, "Parametric Noise Injection: Trainable Randomness to Improve Deep Neural
Network Robustness Against Adversarial Attack", CVPR 2019, arXiv:1811.09310.

Every convolution and linear layer computes with its weight and some noise, drawn anew in each forward pass, in training
and in prediction. How much is learned along with the weights: trained on attacked images, networks choose more than
none.

    w̃ = w + a ⊙ η,   η ~ N(0, std(w)²),   std of the layer's whole weight, unbiased, constant
    dL/dw = dL/dw̃,   dL/da = Σ dL/dw̃ ⊙ η over the weights that share a

When: to compare with. It needs attacks in training: list `galago.augment.adversarial_view.AdversarialView` behind it;
without, nothing keeps a from falling to 0. Costs a second product a layer in training, nothing afterwards: when
training ends the noise is taken out, so that the file has one answer an image. What is measured after each epoch has
its noise. List it behind `Quantize`, which leaves layers float that have noise already.

Usual setting: a = 0.25 at first, one a layer (`per_channel`: one an output channel; `per_weight`: one a weight), no
weight decay on it; ResNet-20 on CIFAR-10 with SGD at 0.1, a tenth from epochs 80 and 120 of 160 on, batch 128, decay
3e-4, half of the loss on images attacked by 7 steps of PGD, from epoch 5 on.
Recipe: recipes/distill/parametric_noise_resnet20_cifar10.yaml.

Output and gradients are checked against the official code's numbers, the settings are that code's. Chosen here: the
product with the noise is added to the layer's own, which is the same and goes around a quantized layer as well; the
noise itself is then not quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from galago.data import Data
from galago.errors import UserError
from galago.layers import Wrapper, innermost
from galago.method import Method
from galago.quantize.quantizer import OwnRates
from galago.quantize.wrapping import places, quantized, require_quantizers_first, unwrapped, wrap

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # exactly these: others compute another weight than they store


def draw(weight: Tensor) -> Tensor:
    """`η`, of the weight's shape."""
    return torch.randn_like(weight) * weight.detach().std()


class NoisyWeight(Wrapper):
    """A layer that computes with noise on its weight.

    Args:
        layer: a convolution or linear layer, quantized or not.
        shape: of a; 1 where weights share it.
    """

    def __init__(self, layer: nn.Module, shape: torch.Size) -> None:
        super().__init__(layer)
        self.alpha = nn.Parameter(torch.full(shape, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output + self.noise(x, draw(innermost(self.layer).get_parameter("weight")))

    def noise(self, x: Tensor, eta: Tensor) -> Tensor:
        """What the layer makes of x with `a ⊙ η` for a weight and without a bias."""
        layer = innermost(self.layer)
        used = {name: torch.zeros_like(tensor) for name, tensor in layer.named_parameters()}
        output: Tensor = functional_call(layer, used | {"weight": self.alpha * eta}, (x,))
        return output

    def own_rates(self) -> OwnRates:
        """a does not decay."""
        return OwnRates(weight_decay=0.0)


class ParametricNoise(Method):
    """Adds noise of learned strength to every weight; list it behind `Quantize`, in front of `AdversarialView`.

    Args:
        per_channel: learn a strength for each output channel instead of one for each layer.
        per_weight: learn a strength for each weight.
    """

    def __init__(self, per_channel: bool = False, per_weight: bool = False) -> None:
        super().__init__()
        if per_channel and per_weight:
            raise UserError("ParametricNoise: per_channel and per_weight exclude each other; set one of them")
        self.per_channel, self.per_weight = per_channel, per_weight
        self._quantized = False

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        found = [place for place in places(model) if type(place.layer) in LAYERS]
        if not found:
            raise UserError("ParametricNoise finds no convolution or linear layer; leave it out")
        self._quantized = bool(quantized(model))
        return wrap(model, found, lambda place, layer: NoisyWeight(layer, self.shape(place.layer)))

    def shape(self, layer: nn.Module) -> torch.Size:
        """Of a, for one layer."""
        weight = layer.get_parameter("weight")
        if self.per_weight:
            return weight.shape
        return torch.Size([len(weight) if self.per_channel else 1, *[1] * (weight.ndim - 1)])

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        require_quantizers_first(model, self._quantized, "ParametricNoise")
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the noise out."""
        require_quantizers_first(model, self._quantized, "ParametricNoise")
        return unwrapped(model, NoisyWeight)
