"""`check`: what a recipe would do, layer by layer, before it does it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from galago import recipe
from galago.console import say
from galago.train import check_fit
from galago.trainer import Learner, prepare


def check(arguments: Sequence[str]) -> int:
    """Builds everything a recipe names, lets each method prepare the network, and shows what it did. Trains nothing."""
    config = recipe.parse(arguments)
    made = recipe.instantiate(config)
    made.data.seed = config.seed
    check_fit(made.model, made.task, made.data)
    learner = Learner(made.model, made.task, made.methods, made.data.normalize)
    prepare(learner, made.data, None)
    for summary in filter(None, (method.summary() for method in learner.ideas)):
        Console(width=None if sys.stdout.isatty() else 140).print(summary)
    steps = sum(len(made.data.train(epoch)) for epoch in range(made.epochs))  # epochs may differ in length
    say(f"the recipe is sound: {made.epochs} epochs, {steps} batches of {made.data.batch_size}, into {config.run}")
    return 0
