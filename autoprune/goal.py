"""What a search is to reach and how long it may take: limits, plan. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from autoprune.core.budget import Budget, Metric, shown
from autoprune.core.floor import Floor
from autoprune.engines.settings import EngineSettings
from autoprune.errors import BudgetError, ConfigError
from autoprune.profile.cost_model import CostModel


@dataclass(frozen=True, slots=True)
class Recover:
    """How candidates are fine-tuned by distillation from the dense model; without steps they are refitted alone."""

    steps: int = 0
    learning_rate: float = 3e-4
    batch: int = 64
    trials: bool = False
    """Whether every trial is scored after its own recovery: long trials, nearer to the truth."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a search is run."""

    trials: int = 200
    seconds: float | None = None
    sampler: str = "budget"
    finalists: int = 6
    refit: bool = True
    recover: Recover = field(default_factory=Recover)
    engine: EngineSettings = field(default_factory=EngineSettings)
    storage: str | None = None
    """URL of a database to record trials in, which others may search with, too; None: a file in the run folder."""


def resolve_limits(costs: CostModel, budget: Budget) -> dict[Metric, float]:
    """The budget in each metric's own unit. Raises BudgetError where it is no limit or out of reach."""
    limits = budget.resolve({metric: costs.dense[metric] for metric in _metrics(budget)})
    for limit in budget.limits:
        least, dense = costs.range(limit.metric)
        wanted = limits[limit.metric]
        reach = f"reachable: {shown(limit.metric, least)} to {shown(limit.metric, dense)} (the dense model)"
        if wanted < least:
            near = min(dense, 1.05 * least)
            percent = f"{math.ceil(100 * near / dense)}%{'' if limit.metric == 'latency' else limit.metric}"
            proposal = percent if limit.relative else shown(limit.metric, near).replace(" ", "")
            raise BudgetError(f"budget {limit.text}: no policy is that cheap here; {reach}; try --budget {proposal}")
        if wanted >= dense:
            raise BudgetError(
                f"budget {limit.text}: the dense model meets it already ({shown(limit.metric, dense)}); {reach}; "
                "try --budget 50%"
            )
    return limits


def _metrics(budget: Budget) -> list[Metric]:
    return [limit.metric for limit in budget.limits]


def check_goal(budgets: Sequence[Budget], floor: Floor) -> None:
    """Raises ConfigError when neither a budget nor a floor was given."""
    if not floor.text and all(not budget.limits for budget in budgets):
        raise ConfigError("give a budget (--budget 5ms) or an accuracy floor (--max-drop 1%), or both")
