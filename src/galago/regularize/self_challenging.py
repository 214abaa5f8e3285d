"""RSC: what a network relies on most is hidden from it while it trains, so that it learns to see more than that.

Zeyi Huang, Haohan Wang, Eric P. Xing, Dong Huang, "Self-Challenging Improves Cross-Domain Generalization", ECCV 2020,
arXiv:2007.02454.

In each step the last feature map is muted where the gradient of the true class's score is largest: at some places of
each image, or in some channels. Only the images that this hurts most stay muted, and the network learns from what is
left.

    g = ∂(Σ_b z_(b,y_b)) / ∂F,   head in evaluation mode;   ḡ = mean of g over places
    scores: Σ_c F_(b,c,hw) ḡ_(b,c) of each place, or ḡ_(b,c) of each channel; a coin decides which, once a step
    M = 0 where a score is above the sorted one at number n: n = ⌈HW / 3⌉ places, or ⌈C / 3.2⌉ channels; else 1
    Δ = relu(p_y(h(F)) - p_y(h(F M)) - 1e-4);   M stays where Δ is above the sorted one at number round(B q), else M = 1
    L = L_task(h(F M), y)

When: images that will not look like those trained on (another camera, another style). It costs a few more passes of
the head in each step, and `compile` takes the network in pieces. Nothing is left of it when training ends. List it
behind methods that change the batch.

Usual setting (recalled for the paper): a third of the places, 31 % of the channels, q = 1/3. Official code for PACS:
ResNet-18 from ImageNet, q = 0.3 and 0.5 from half of the 20 epochs on (`schedule`: `Steps` at 0.5 with factor 5/3), SGD
at 0.01, ×0.1 at 80 %, batch 64 with all images mirrored beside it, decay 5e-4.
Recipe: recipes/regularize/rsc_resnet20_cifar10.yaml.

Scores, masks, loss and gradients are checked against the official code's numbers. Chosen here: where no layer is named,
it is the last one whose map, averaged over places, is what the classifier takes in. A head of another kind is named by
its modules, in the order in which they run; tokens of transformers are not muted. With mixed labels the true class's
score and probability are Σ_c t_c z_c and Σ_c t_c p_c. Scores that tie with the sorted one stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from galago.batch import Batch, Step
from galago.data import Data
from galago.errors import UserError
from galago.layers import classifier, find, innermost
from galago.method import Forward, Method
from galago.probe import device_of, evaluating, normalized
from galago.regularize.muting import (
    averaged_layer,
    challenge,
    looking_ahead,
    near,
    takes_rows,
    uncompiled,
    unhook,
    watched,
)
from galago.schedule import Constant, Schedule
from galago.taps import Taps
from galago.task import require_probabilities, scores_of


class SelfChallenging(Method):
    """Mutes the features that the true class relies on most; list it behind methods that change the batch.

    Args:
        layer: whose feature map is muted, by path; None finds the one that is averaged for the classifier.
        head: paths of the modules behind it, in order; none where that is an average and the classifier.
        place_share: of the places of a map that are muted.
        channel_share: of its channels.
        place_probability: how often places are muted, and not channels.
        batch_share: q, of the images of a batch that may stay muted.
        schedule: a factor on q over the training.
    """

    def __init__(
        self,
        layer: str | None = None,
        head: Sequence[str] = (),
        place_share: float = 1 / 3,
        channel_share: float = 1 / 3.2,
        place_probability: float = 0.5,
        batch_share: float = 1 / 3,
        schedule: Schedule = Constant(),  # noqa: B008 - has no state
    ) -> None:
        super().__init__()
        shares = {"place_share": place_share, "channel_share": channel_share, "batch_share": batch_share}
        for name, share in (shares | {"place_probability": place_probability}).items():
            if not 0 <= share <= 1:
                raise UserError(f"SelfChallenging: {name} is {share:g}; give a share from 0 to 1")
        if head and layer is None:
            raise UserError("SelfChallenging: head is given but not the layer in front of it; name that, too")
        self.layer, self.head, self.schedule = layer, list(head), schedule
        self.place_share, self.channel_share, self.batch_share = place_share, channel_share, batch_share
        self.place_probability = place_probability
        self._head: tuple[nn.Module, ...] = ()  # a tuple, so that it is no part of this module
        self._target: Tensor | None = None  # while a step runs
        self._places, self._share, self._told = True, 0.0, ""
        self._hook: Any = None

    def prepare(self, model: nn.Module, data: Data) -> nn.Module:
        """Puts a hook on the layer, which stays until training ends.

        Raises:
            UserError: no such layer is found, or the head named does not lead from it to the network's scores.
        """
        image = normalized(data, data.example()[:1], device_of(model))
        with evaluating(model), torch.no_grad():
            path = averaged_layer(model, image) if self.layer is None else self.layer
            self._head = tuple(find(model, name) for name in self.head or [classifier(model)])
            self._check(model, path, image)
        self._hook = uncompiled(self._muted)
        innermost(find(model, path)).register_forward_hook(self._hook)
        self._told = f"SelfChallenging: mutes {path}, in front of {', '.join(self.head) or 'the classifier'}"
        return model

    def step(self, batch: Batch, inner: Forward) -> Step:
        self._places = bool(torch.rand((), device="cpu") < self.place_probability)
        self._share = min(self.batch_share * self.schedule(inner.progress), 1.0)
        self._target = require_probabilities(batch, "SelfChallenging")
        try:
            return inner(batch)
        finally:
            self._target = None

    def finish(self, model: nn.Module) -> nn.Module:
        """Takes the hook away."""
        unhook(model, self._hook)
        return model

    def summary(self) -> str:
        """Which layer is muted."""
        return self._told

    def _muted(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        """The hook: what the layer gives on, times M."""
        if self._target is None or not module.training or Taps.resting:
            return output
        if len(self._target) != len(output):
            raise UserError("SelfChallenging: a method behind it changes how many images there are; list it in front")
        share = self.place_share if self._places else self.channel_share
        with looking_ahead(self._head, output.device):
            mask = challenge(output, self._target, self._answer, self._places, share, self._share)
        return output * mask.to(output.dtype)

    def _answer(self, feature: Tensor) -> Tensor:
        """The head's scores N×K of features N×C×H×W."""
        output: Any = feature if self.head else feature.mean((2, 3))
        for part in self._head:
            output = part(output.flatten(1) if takes_rows(part) else output)
        return scores_of(output)

    def _check(self, model: nn.Module, path: str, image: Tensor) -> None:
        feature, output = watched(model, path, image)
        if not isinstance(feature, Tensor) or feature.ndim != 4:
            raise UserError(f"SelfChallenging: layer {path!r} gives no map N×C×H×W; name one that does")
        try:
            agrees = near(self._answer(feature), scores_of(output))
        except RuntimeError:  # shapes that do not fit
            agrees = False
        if not agrees:
            given = f"the modules {self.head}" if self.head else "an average over places and the classifier"
            raise UserError(
                f"SelfChallenging: {given} do not make the network's scores of what {path!r} gives;"
                " name the layer, and as head all modules that run behind it, in order"
            )
