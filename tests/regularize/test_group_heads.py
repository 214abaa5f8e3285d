import torch

from galago.laws.trial import TinyImages, Trial, classify, tiny_network
from galago.probe import Deployed, collect
from galago.regularize.autogenous import Autogenous
from galago.regularize.group_heads import GroupHeadAccuracy
from galago.testing import check_probe
from galago.trainer import finish

DATA = TinyImages()


def test_accuracies_are_those_of_each_head() -> None:
    trial = Trial(tiny_network, classify(), DATA, lambda: [Autogenous(tiny_network(), ["stem"], [2], ship_joint=True)])
    for number in range(6):
        trial.step(number)
    network = trial.learner.model.eval()
    deployed = Deployed(network, DATA.normalize, classify()).eval()
    found = GroupHeadAccuracy()(deployed, classify(), DATA)
    assert list(found) == ["accuracy_main", "accuracy_joint", "accuracy_groups_1"]
    outputs = collect(deployed, DATA.validation())
    label = outputs.target.argmax(1)
    assert found["accuracy_joint"] == (outputs.output.argmax(1) == label).double().mean().item()
    group = torch.tensor(network.groups[0])
    images = torch.cat([DATA.normalize(batch.input) for batch in DATA.validation()])
    with torch.no_grad():
        heads = network.heads(images)
    assert found["accuracy_groups_1"] == (heads.branches[0].argmax(1) == group[label]).double().mean().item()
    assert found["accuracy_main"] == (heads.main.argmax(1) == label).double().mean().item()
    shipped = Deployed(finish(trial.learner).alone(), DATA.normalize, classify())
    assert GroupHeadAccuracy()(shipped, classify(), DATA) == {}


def test_it_obeys_the_laws() -> None:
    check_probe(
        GroupHeadAccuracy,
        lambda: Autogenous(tiny_network(), ["stem"], [2]).prepare(tiny_network(), DATA),
        same_on_artifact=False,
    )
    check_probe(GroupHeadAccuracy)
