"""A method of one's own, named in a search space file as "module:Class"."""

from pathlib import Path

import torch
from own_model.model import data, model
from torch import Tensor

from autoprune.api import search
from autoprune.goal import Plan
from autoprune.methods.base import Need, UnitView, order_by


class Outgoing:
    """Channels go first that the layers reading them weigh least (Euclidean norm of the outgoing weights)."""

    name: str = "outgoing"
    version: int = 1
    needs: frozenset[Need] = frozenset()

    def removal_order(self, view: UnitView, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """A permutation of the channels (width,): the least outgoing weight goes first."""
        weights = torch.cat([consumer.weight.transpose(0, 1).flatten(1) for consumer in view.consumers], dim=1)
        return order_by(weights.norm(dim=1))  # (width, everything read from it) -> (width,)


if __name__ == "__main__":
    space = Path(__file__).with_suffix(".yaml")
    outcome = search(model(), **data(), budget="50%macs", space=str(space), plan=Plan(trials=20))
    print("met:" if outcome.met else "missed:", outcome.record.verdict)
    for unit, decision in outcome.policy.units.items():
        print(f"{unit}: {decision.keep} of {decision.of} by {decision.method}")
