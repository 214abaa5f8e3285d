"""ShakeDrop: residual branches are multiplied by random numbers, others backward than forward.

Yoshihiro Yamada, Masakazu Iwamura, Takuya Akiba, Koichi Kise, "ShakeDrop Regularization for Deep Residual Learning",
IEEE Access 2019, arXiv:1802.02375 (recalled; one of the regularizers compared in arXiv:2003.03879).

In training a branch passes as it is, or it is disturbed: turned around or weakened forward, and weakened by another
number backward. The network cannot rely on any branch, the less the deeper it lies.

    b_l ~ Bernoulli(p_l),  p_l = 1 - (l / L) (1 - p_L),  l = 1 … L;      α ~ U(-1, 1),  β ~ U(0, 1)
    forward    x + (b_l + α - b_l α) F_l(x)
    backward   F_l's gradient times (b_l + β - b_l β)
    evaluation x + p_l F_l(x)

When: deep residual networks trained from scratch for long; short trainings and shallow networks rather suffer. It
costs two products a branch. When training ends p_l goes into the weights of the branch's last layer, and nothing is
left of it. List it behind `Quantize`, if there is one.

Usual setting: p_L = 0.5, 300 epochs (paper: PyramidNet, 1800). Recipe:
recipes/regularize/shake_drop_resnet20_cifar10.yaml.

Chosen here, the paper being recalled: b_l is drawn once for a batch, α and β for each image. Branches are found by
what runs (`galago.regularize.residual`), so any network with residual sums will do, as far as its branches end in a
layer with a weight. The two factors need no backward pass of their own: `y β' + constant (y α' - y β')`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from galago.data import Data
from galago.errors import UserError
from galago.method import Method
from galago.quantize.wrapping import quantized, require_quantizers_first
from galago.regularize.residual import Branch, fold_survival, said, scale_branches


def passed(gate: Tensor, noise: Tensor) -> Tensor:
    """`b + a - b a`: 1 where the gate is open, the noise where it is shut.

    >>> passed(torch.tensor([1.0, 0.0]), torch.tensor([-0.3, -0.3]))
    tensor([ 1.0000, -0.3000])
    """
    return gate + (1 - gate) * noise  # the same, and exactly 1 for an open gate


def shaken(y: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
    """`y` times one factor, with a gradient as if it were another.

    Args:
        y: N×….
        forward: what y is multiplied by; fits y's shape.
        backward: what the gradient is multiplied by, likewise.

    >>> y = torch.ones(1, requires_grad=True)
    >>> shaken(y, torch.tensor(-0.5), torch.tensor(0.25)).item()
    -0.5
    >>> torch.autograd.grad(shaken(y, torch.tensor(-0.5), torch.tensor(0.25)), y)[0].item()
    0.25
    """
    return y * backward + (y * (forward - backward)).detach()


class ShakenBranch(Branch):
    """The last layer of a residual branch, shaken in training.

    Args:
        layer: gives N×….
        survival: p_l.
    """

    def perturbed(self, y: Tensor) -> Tensor:
        gate = (torch.rand((), device=y.device) < self.survival).to(y.dtype)
        shape = (len(y), *[1] * (y.ndim - 1))
        alpha, beta = (torch.rand(shape, device=y.device, dtype=y.dtype) for _ in range(2))
        return shaken(y, passed(gate, 2 * alpha - 1), passed(gate, beta))


class ShakeDrop(Method):
    """Disturbs residual branches; list it behind `Quantize`.

    Args:
        last_survival: p_L, how likely the last branch passes as it is; the first ones nearly always do.
    """

    def __init__(self, last_survival: float = 0.5) -> None:
        super().__init__()
        if not 0 <= last_survival <= 1:
            raise UserError(f"ShakeDrop: last_survival is {last_survival:g}; give a probability, usually 0.5")
        self.last_survival = last_survival
        self._said, self._quantized = "", False

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Wraps the last layer of each residual branch.

        Raises:
            UserError: there is none.
        """
        self._quantized = bool(quantized(model))
        model = scale_branches(model, data, ShakenBranch, self.last_survival)
        self._said = said(model)
        return model

    def epoch(self, model: nn.Module, epoch: int) -> nn.Module:
        require_quantizers_first(model, self._quantized, "ShakeDrop")
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        """Puts p_l into the weights and takes the wrappers away."""
        require_quantizers_first(model, self._quantized, "ShakeDrop")
        return fold_survival(model)

    def summary(self) -> str | None:
        """Which branches pass with which probability."""
        return f"ShakeDrop: branches pass with probability {self._said}" if self._said else None
