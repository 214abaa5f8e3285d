"""Monte Carlo dropout: a network with dropout, asked several times with it on, says how far it can be trusted.

Yarin Gal, Zoubin Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning",
ICML 2016, arXiv:1506.02142.

Passes with dropout on are draws from an approximate posterior of networks. Each image is shown `passes` times, all else
(BatchNorm) being in evaluation mode; the formulas of the mean p̄, its entropy H and the mutual information I of answer
and draw are in `galago.draws`. Of p̄ on the test images:

    dropout_accuracy, dropout_nll, dropout_ece       beside those of a single pass without dropout
    dropout_entropy, dropout_epistemic               means of H and I, in nats
    dropout_aurc_entropy, dropout_aurc_epistemic     error against coverage, images ranked by H or by I

When: a network with dropout (`galago.regularize.dropout`, or one of its own), to see whether asking it several times is
worth `passes` times the cost: whether p̄ is better calibrated, and whether H or I finds its errors. A network without
dropout, or a file, which holds none, gives no numbers.

Usual setting: 20 passes; the paper averages up to 1000.

Chosen here: dropout is that of PyTorch's own layers with a rate above 0; what a network drops by other means stays off.
ECE has 15 bins. Random numbers start from the same seed in every measurement.
"""

from __future__ import annotations

from torch import nn

from galago.data import Data
from galago.draws import Dropping, asked, dropouts, entropy, epistemic, log_mean_probability
from galago.errors import UserError
from galago.probe import Probe
from galago.probes.selective import area, risks
from galago.reliability import answers, negative_log_likelihood, reliability, require_finite
from galago.task import Task

BINS = 15


class MonteCarloDropout(Probe):
    """Accuracy, calibration and doubt of the mean of several passes with dropout on, on the test images.

    Args:
        passes: how often each image is shown.
    """

    def __init__(self, passes: int = 20) -> None:
        if passes < 1:
            raise UserError(f"MonteCarloDropout: passes is {passes}; give 1 or more, usually 20")
        self.passes = passes

    def __call__(self, deployed: nn.Module, task: Task, data: Data) -> dict[str, float]:
        if not dropouts(deployed):
            return {}
        passes = asked(Dropping(deployed), data.test(), self.passes)
        require_finite(passes.output.flatten(0, 1))
        scores, label = passes.output, passes.target.argmax(1)
        probabilities = log_mean_probability(scores).exp()
        confidence, correct = answers(probabilities, label)
        return {
            "dropout_accuracy": float(correct.double().mean()),
            "dropout_nll": negative_log_likelihood(probabilities, label),
            "dropout_ece": reliability(confidence, correct, BINS).expected_error(),
            "dropout_entropy": float(entropy(scores).mean()),
            "dropout_epistemic": float(epistemic(scores).mean()),
            "dropout_aurc_entropy": area(risks(entropy(scores), correct)),
            "dropout_aurc_epistemic": area(risks(epistemic(scores), correct)),
        }
