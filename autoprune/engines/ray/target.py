"""Measurements on the node that is the target: one at a time, on all its CPUs, so that nothing of Ray's runs beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import ray
from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from autoprune.engines import freight
from autoprune.engines.freight import Freight
from autoprune.engines.local import this_machine
from autoprune.engines.settings import START_TARGET, TARGET, EngineSettings
from autoprune.errors import AutopruneError, RunError, TargetError
from autoprune.progress import Progress, TrialSeen

_LOOK_S = 0.2


@final
class Target:
    """Where numbers are measured that a policy claims."""

    def __init__(self, settings: EngineSettings, progress: Progress) -> None:
        self._settings = settings
        self._progress = progress
        self._names: dict[str, str] = {}

    def where(self) -> str | None:
        """What the target's machine is called; None where no node is the target now."""
        nodes = targets()
        if not nodes:
            return None
        identity = nodes[0]["NodeID"]
        if identity not in self._names:
            self._names[identity] = ray.get(_name().options(**_there(nodes[0])).remote())
        return self._names[identity]

    def wait(self) -> str:
        """The same, waited for. Raises TargetError when none comes."""
        self._node()
        where = self.where()
        assert where is not None
        return where

    def measure(self, work: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `work` returns there, or raise what it raises there. A node that dies meanwhile costs a retry."""
        progress = kwargs.get("progress", self._progress)
        remote = {key: value for key, value in kwargs.items() if key != "progress"}
        cargo = ray.put(freight.pack((work, tuple(args), remote)))
        for attempt in range(1 + self._settings.retries):
            node = self._node()
            queue = Queue(actor_options={"num_cpus": 0}) if "progress" in kwargs else None
            task = ray.remote(_measured).options(max_retries=0, **_alone(node))
            reference = task.remote(cargo, queue)
            try:
                return self._heard(reference, queue, progress)
            except (NodeDiedError, WorkerCrashedError) as error:
                self._progress.note(f"ray: the target's node or process died while it measured ({attempt + 1})")
                last = error
            finally:
                if queue is not None:
                    queue.shutdown()
        raise RunError(f"ray: measuring failed {1 + self._settings.retries} times, the last with: {last}") from last

    def _heard(self, reference: Any, queue: Queue | None, progress: Progress) -> Any:
        while True:
            ready, _ = ray.wait([reference], timeout=_LOOK_S)
            if queue is not None:
                _pass_on(queue, progress)
            if ready:
                break
        try:
            return ray.get(reference)
        except RayTaskError as failed:
            cause = failed.cause
            if isinstance(cause, AutopruneError):
                raise cause from failed
            raise

    def _node(self) -> Mapping[str, Any]:
        """A node that is the target, waited for if need be: an autoscaler may bring one."""
        until, told = time.monotonic() + self._settings.ray.target_wait_s, False
        while not (nodes := targets()):
            if not told:
                told = True
                self._progress.note(f"ray: waiting for a node with the resource {TARGET} to measure on")
                wanted = _name().options(resources={TARGET: 1}).remote()  # which an autoscaler sees
            if time.monotonic() > until:
                ray.cancel(wanted)
                raise TargetError(
                    f"ray: no node carries the resource {TARGET} after {self._settings.ray.target_wait_s:.0f} s, so "
                    f"nothing can be measured; nothing that was found is lost: {START_TARGET} and resume the search"
                )
            time.sleep(_LOOK_S)
        return nodes[0]


def targets() -> list[dict[str, Any]]:
    """The nodes that are the target, the same first every time."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(TARGET, 0) >= 1]
    return sorted(nodes, key=lambda node: str(node["NodeID"]))


def _name() -> Any:
    """A task that tells its machine's name."""
    return ray.remote(num_cpus=0)(this_machine)


def _there(node: Mapping[str, Any]) -> dict[str, Any]:
    """On that node, beside whatever runs there."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}


def _alone(node: Mapping[str, Any]) -> dict[str, Any]:
    """On that node with all its CPUs (a target may be started with none, to keep evaluations away), one at a time."""
    return _there(node) | {"num_cpus": node["Resources"].get("CPU", 0), "resources": {TARGET: 1}}


def _pass_on(queue: Queue, progress: Progress) -> None:
    """Tell here what was told there."""
    while True:
        try:
            name, args = queue.get(block=False)
        except Empty:
            return
        told: dict[str, Callable[..., None]] = {
            "phase": progress.phase, "step": progress.step, "note": progress.note,
        }  # fmt: skip
        told[name](*args)


class _Relay:
    """A listener on another node."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def phase(self, name: str, steps: int | None = None) -> None:
        """Pass it on."""
        self._queue.put(("phase", (name, steps)))

    def step(self, done: int = 1) -> None:
        """Pass it on."""
        self._queue.put(("step", (done,)))

    def trial(self, seen: TrialSeen) -> None:
        """No trials where something is measured."""

    def note(self, text: str) -> None:
        """Pass it on."""
        self._queue.put(("note", (text,)))


def _measured(cargo: Freight, queue: Queue | None) -> Any:
    work, args, kwargs = freight.unpack(cargo)
    heard = {} if queue is None else {"progress": _Relay(queue)}
    return work(*args, **kwargs, **heard)
