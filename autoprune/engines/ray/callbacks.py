"""Ray Tune's callbacks for evaluations that Tune does not run: loggers (MLflow, W&B, TensorBoard) hear of them all the
same, each as a Tune trial with one result.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final
from uuid import uuid4

from ray.train._internal.storage import StorageContext
from ray.tune.experiment import Trial

from autoprune.engines.base import Ended, Job, Lanes
from autoprune.engines.ray.tune import METRIC, simple_attrs


@final
class Heard:
    """Lanes of which callbacks hear."""

    def __init__(self, lanes: Lanes, callbacks: Sequence[Any], folder: Path) -> None:
        self._lanes = lanes
        self._callbacks = callbacks
        name = f"search-{uuid4().hex[:8]}"
        self._storage = StorageContext(storage_path=str(folder.resolve() / "tune"), experiment_dir_name=name)
        self._folder = folder.resolve() / "tune" / name
        self._trials: dict[int, Trial] = {}
        self._begun = time.monotonic()
        self._done = 0
        for callback in callbacks:
            callback.setup()

    def idle(self) -> int:
        """As the lanes say."""
        return self._lanes.idle()

    def start(self, job: Job) -> None:
        """Begin a job, as a trial whose configuration is the choice."""
        config = {"number": job.number, **{f"unit{index}": option for index, option in enumerate(job.choice)}}
        trial = Trial("autoprune", config=config, stub=True, storage=self._storage, trial_id=f"{job.number:05d}")
        trial.init_local_path()
        self._trials[job.number] = trial
        self._tell("on_trial_start", trial)
        self._lanes.start(job)

    def wait(self, seconds: float) -> Ended | None:
        """The next that ended, told before it is handed on."""
        ended = self._lanes.wait(seconds)
        trial = None if ended is None else self._trials.pop(ended.number, None)
        if ended is None or trial is None:
            return ended
        self._done += 1
        if ended.score is None:
            self._over("on_trial_error", trial)
            return ended
        result = {
            METRIC: ended.score.value, "samples": ended.score.samples, **simple_attrs(ended.score),
            "training_iteration": 1,
            "timesteps_total": ended.number, "time_total_s": time.monotonic() - self._begun,
            "trial_id": trial.trial_id, "config": trial.config, "done": True,
        }  # fmt: skip
        trial.update_last_result(result)
        self._tell("on_trial_result", trial, result=result)
        self._over("on_trial_complete", trial)
        return ended

    def cancel(self) -> None:
        """Give up what is running, which callbacks hear as errors."""
        self._lanes.cancel()
        for trial in self._trials.values():
            self._over("on_trial_error", trial)
        self._trials.clear()

    def close(self) -> None:
        """End the experiment."""
        self._lanes.close()
        for callback in self._callbacks:
            callback.on_experiment_end(trials=[])

    def _over(self, event: str, trial: Trial) -> None:
        """Tell that a trial has ended, and bring what was written for it into the run folder, as Tune does."""
        self._tell(event, trial)
        shutil.copytree(trial.local_path, self._folder / Path(trial.local_path).name, dirs_exist_ok=True)

    def _tell(self, event: str, trial: Trial, **more: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(iteration=self._done, trials=list(self._trials.values()), trial=trial, **more)
