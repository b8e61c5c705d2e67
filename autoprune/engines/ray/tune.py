"""Ray Tune, for what is long: evaluations in rungs under ASHA, and recovery by population-based training.

Tune starts, stops, moves and retries; it proposes nothing. Its searcher hands out the jobs that the search asked for,
so the study stays the only record. A Tune trial costs a tenth of a second and more however short it is (see DECISIONS),
which is why short evaluations have actors of their own (`lanes`).
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final
from uuid import uuid4

import numpy as np
import ray
import safetensors.torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.stopper import Stopper
from torch import Tensor

from autoprune.engines import freight
from autoprune.engines.base import Climb, Course, Ended, Job, Recovery, Score, WorkerLostError
from autoprune.engines.freight import Freight
from autoprune.engines.settings import EngineSettings
from autoprune.engines.worker import sendable
from autoprune.errors import RunError

METRIC = "divergence"
"""What Tune, its schedulers and callbacks see of a score."""
REDUCTION = 2
"""Of those on a rung ASHA lets one in so many go on."""
_RUNG, _SAMPLES, _TOP, _FAILED = "rung", "samples", "top", "failed"
"""Further keys of what Tune is told."""
_ATTR = "score_"
"""The beginning of those keys that hold a score's attributes; Tune would take a mapping apart."""
_STATE = "state.safetensors"
_LOOK_S = 0.05
_END_S = 60.0


def simple_attrs(score: Score) -> dict[str, int | float | str]:
    """The attributes of a score that Tune and its callbacks can show."""
    return {key: value for key, value in score.attrs.items() if isinstance(value, int | float | str)}


class Climbing(tune.Trainable):  # type: ignore[misc]
    """One job after the other; a step is a rung."""

    def setup(self, config: dict[str, Any], cargo: Freight | None = None) -> None:
        """Unpack once; actors are reused."""
        assert cargo is not None
        self._climb: Climb = freight.unpack(cargo)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next job."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next rung."""
        self._at += 1
        try:
            score = next(self._rungs)
        except Exception as error:  # noqa: BLE001  (who asked decides what an error means)
            return {METRIC: math.inf, _FAILED: sendable(error), "done": True, _RUNG: 1}
        top = self._at == self._climb.height
        attrs = {f"{_ATTR}{key}": each for key, each in simple_attrs(score).items()}
        # Powers of the reduction factor, so that every rung is one of ASHA's.
        rung = REDUCTION ** (self._at - 1)
        return {METRIC: score.value, _SAMPLES: score.samples, **attrs, _RUNG: rung, _TOP: top, "done": top}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a job that is lost is begun again."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing."""

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._at = 0
        self._rungs: Iterator[Score] = self._climb.rungs(tuple(config["choice"]))


class Jobs(Searcher):  # type: ignore[misc]
    """Hands out the jobs that the search asked for, and hears how they ended."""

    def __init__(self) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.asked: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.ended: queue.SimpleQueue[Ended] = queue.SimpleQueue()
        self.closed = threading.Event()
        self._numbers: dict[str, int] = {}

    def __deepcopy__(self, memo: object) -> Jobs:
        """Itself: it is the end of a line to the search."""
        return self

    def __reduce__(self) -> tuple[type[Jobs], tuple[()]]:
        """An empty one, for the copy of the experiment that Tune writes down: the study remembers, not Tune."""
        return Jobs, ()

    def suggest(self, trial_id: str) -> Any:
        """The next job, if there is one."""
        if self.closed.is_set():
            return Searcher.FINISHED
        try:
            job = self.asked.get(timeout=_LOOK_S)
        except queue.Empty:
            return None
        self._numbers[trial_id] = job.number
        return {"choice": list(job.choice), "number": job.number, "whole": job.whole}

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Pass it on: to the top, stopped on the way, or failed for good."""
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        if error or not result or METRIC not in result:
            self.ended.put(Ended(number, None, WorkerLostError("its workers were lost, one after the other")))
        elif _FAILED in result:
            self.ended.put(Ended(number, None, result[_FAILED]))
        else:
            attrs = {key.removeprefix(_ATTR): value for key, value in result.items() if key.startswith(_ATTR)}
            score = Score(
                result[METRIC], result[_SAMPLES], pruned=not result[_TOP], attrs=attrs, rung=int(result[_RUNG])
            )
            self.ended.put(Ended(number, score))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study remembers."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA (arXiv:1810.05934), except that what is to be scored to the end is."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if trial.config.get("whole") and not result.get(_TOP) else decision


class _UntilClosed(Stopper):  # type: ignore[misc]
    """Ends everything, running trials too, once the lanes are closed."""

    def __init__(self, closed: threading.Event | None) -> None:
        self._closed = closed

    def __deepcopy__(self, memo: object) -> _UntilClosed:
        return self

    def __reduce__(self) -> tuple[type[_UntilClosed], tuple[None]]:
        return _UntilClosed, (None,)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._closed is not None and self._closed.is_set()


@final
class TuneLanes:
    """Lanes of one run of Tune, which goes on in a thread until they are closed."""

    def __init__(self, climb: Climb, settings: EngineSettings, *, workers: int, folder: Path) -> None:
        self._climb = climb
        self._settings = settings
        self._workers = workers
        self._folder = folder
        self._cargo = ray.put(freight.pack(climb))
        self._begin()

    def idle(self) -> int:
        """Jobs that Tune would start at once if the cluster has room."""
        return self._workers - self._started

    def start(self, job: Job) -> None:
        """Lay it ready for Tune."""
        self._started += 1
        self._jobs.asked.put(job)

    def wait(self, seconds: float) -> Ended | None:
        """The next that ended. Raises RunError when Tune did."""
        try:
            ended = self._jobs.ended.get(timeout=seconds)
        except queue.Empty:
            if not self._thread.is_alive():
                raise RunError(f"ray tune ended by itself ({self._why}); nothing that was told is lost") from None
            return None
        self._started -= 1
        return ended

    def cancel(self) -> None:
        """End the run of Tune with all that is running, and begin another."""
        self.close()
        self._begin()

    def close(self) -> None:
        """End the run of Tune."""
        self._jobs.closed.set()
        self._thread.join(_END_S)

    def _begin(self) -> None:
        self._jobs = Jobs()
        self._started = 0
        self._why = "it did not say why"
        self._thread = threading.Thread(target=self._run, args=(self._jobs,), name="autoprune-tune", daemon=True)
        self._thread.start()

    def _run(self, jobs: Jobs) -> None:
        try:
            self._tuner(jobs).fit()
        except Exception as error:  # noqa: BLE001  (told by `wait`, in the thread that can do something about it)
            self._why = f"{type(error).__name__}: {error}"

    def _tuner(self, jobs: Jobs) -> tune.Tuner:
        asked = self._settings.ray
        scheduler = FIFOScheduler()
        if asked.asha:
            most = REDUCTION ** (self._climb.height - 1)
            scheduler = _Asha(
                time_attr=_RUNG, metric=METRIC, mode="min", grace_period=1, max_t=most, reduction_factor=REDUCTION
            )
        trainable = tune.with_resources(
            tune.with_parameters(Climbing, cargo=self._cargo), {"cpu": asked.cpus, "gpu": asked.gpus}
        )
        # The searcher has the metric and the mode already.
        return tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=jobs, scheduler=scheduler, num_samples=-1, max_concurrent_trials=self._workers,
                reuse_actors=True,
            ),
            run_config=_run_config(self._settings, self._folder, stop=_UntilClosed(jobs.closed)),
        )  # fmt: skip


class Studying(tune.Trainable):  # type: ignore[misc]
    """One member of a population; a step is a round of the course."""

    _last: float = math.inf

    def setup(self, config: dict[str, Any], cargo: Freight | None = None) -> None:
        """Unpack once; actors are reused."""
        assert cargo is not None
        self._course: Course = freight.unpack(cargo)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another member; its weights come with a checkpoint."""
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """The next round."""
        if not self._recovery.over:
            self._last = self._recovery.round()
        return {METRIC: self._last, "done": self._recovery.over}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """The state, as tensors alone."""
        safetensors.torch.save_file(self._recovery.state(), Path(checkpoint_dir, _STATE))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Another member's weights, our own hyperparameters."""
        self._recovery.load(safetensors.torch.load_file(Path(checkpoint, _STATE)))
        self._recovery.retune(self._given)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._given = {name: float(config[name]) for name in self._course.given}
        self._recovery: Recovery = self._course.begin()
        self._recovery.retune(self._given)
        self._last = math.inf


def population(course: Course, settings: EngineSettings, *, folder: Path, seed: int = 0) -> Mapping[str, Tensor] | None:
    """Train `settings.ray.population` copies side by side by population-based training (arXiv:1711.09846): after every
    second round the worst quarter goes on from the weights of the best, with hyperparameters that are changed a little.

    The first copy has the hyperparameters that the course gives. The state of the best round of all copies; None where
    no score was finite. Checkpoints are in `folder`, which all nodes must see.
    """
    space = {name: tune.loguniform(*bounds) for name, bounds in course.ranges.items()}
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration", metric=METRIC, mode="min", perturbation_interval=2,
        hyperparam_mutations=dict(space), quantile_fraction=0.25, synch=False,
    )  # fmt: skip
    trainable = tune.with_parameters(Studying, cargo=ray.put(freight.pack(course)))
    resources = {"cpu": settings.ray.cpus, "gpu": settings.ray.gpus}
    found = tune.Tuner(
        tune.with_resources(trainable, resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=BasicVariantGenerator(points_to_evaluate=[dict(course.given)], random_state=seed),
            scheduler=scheduler, num_samples=settings.ray.population, reuse_actors=True,
        ),
        run_config=_run_config(settings, folder, checkpoints=True),
    ).fit()  # fmt: skip
    scored = [
        (float(metrics[METRIC]), checkpoint)
        for result in found
        for checkpoint, metrics in result.best_checkpoints
        if np.isfinite(metrics.get(METRIC, math.nan))
    ]
    if not scored:
        return None
    _, best = min(scored, key=lambda one: one[0])
    with best.as_directory() as place:
        state: Mapping[str, Tensor] = safetensors.torch.load_file(Path(place, _STATE))
    return state


def _run_config(
    settings: EngineSettings, folder: Path, *, stop: Stopper | None = None, checkpoints: bool = False
) -> tune.RunConfig:
    """Silent, with the person's callbacks, in the run folder."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints even when told to be silent
    kept = tune.CheckpointConfig(
        num_to_keep=4, checkpoint_score_attribute=METRIC, checkpoint_score_order="min", checkpoint_frequency=1,
        checkpoint_at_end=True,
    )  # fmt: skip
    return tune.RunConfig(
        name=f"tune-{uuid4().hex[:8]}", storage_path=str(folder.resolve() / "tune"), verbose=0, stop=stop,
        callbacks=list(settings.ray.callbacks), failure_config=tune.FailureConfig(max_failures=settings.retries),
        checkpoint_config=kept if checkpoints else tune.CheckpointConfig(),
    )  # fmt: skip
