"""Real Ray clusters on this machine for tests: a head on ports and in a folder of its own, and further nodes of it.

Ends the processes it started and no others, so that several clusters and several people can be on one machine; `ray
stop` would end them all. Everything is patient: on a busy machine a head takes a minute and more to start.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import ray  # noqa: F401

psutil: Any = import_module("psutil")  # Ray brings its own along, which is found once Ray is imported

START_S = 300
"""How long a node may take to start."""
STOP_S = 30
ATTEMPTS = 3
"""Between looking for a free port and using it another process may take it."""
PATIENCE = {
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_worker_register_timeout_seconds": "300",
}
ELSEWHERE = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables that are about other clusters."""
_LOOK_S = 0.2


@dataclass(slots=True)
class Node:
    """One node: the process that holds it together, and those it started."""

    process: subprocess.Popen[bytes]
    log: Path
    known: set[Any] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """At once, as when a machine loses its power."""
        self._look()
        for each in self.known:
            with suppress(psutil.Error):
                each.kill()
        self.process.wait()

    def stop(self) -> None:
        """In order; what is left after a while is killed."""
        self._look()
        if self.alive:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        psutil.wait_procs(self.known, timeout=STOP_S / 6)
        self.kill()

    def _look(self) -> None:
        """Remember every process below; psutil's values stay those processes even where an id is used again."""
        for root in [root for root in (_process(self.process.pid), *self.known) if root is not None]:
            with suppress(psutil.Error):
                self.known |= {root, *root.children(recursive=True)}


@dataclass(frozen=True, slots=True)
class Head:
    """A cluster's first node."""

    address: str
    """Where further nodes and drivers connect: host:port."""
    jobs: str
    """Where jobs are submitted, a URL; nothing answers there without a dashboard."""
    folder: Path
    node: Node
    environment: Mapping[str, str]
    """Of commands that are about this cluster."""


@contextmanager
def head(
    cpus: int = 2, resources: Mapping[str, float] | None = None, *, dashboard: bool = True, token: str | None = None
) -> Iterator[Head]:
    """`ray start --head`; with `dashboard` it takes jobs. Raises RuntimeError with Ray's own words if it fails."""
    variables = environment(token)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(_short_folder()))
        for attempt in range(ATTEMPTS):
            gcs, jobs, agent, client = _free_ports(4)
            asked = [
                "--head", f"--port={gcs}", f"--include-dashboard={str(dashboard).lower()}", f"--temp-dir={folder}",
                "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}", f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}",
            ]  # fmt: skip
            started = _started(asked, cpus, resources, log=folder / f"head{attempt}.log", variables=variables)
            stack.callback(started.stop)
            url = f"http://127.0.0.1:{jobs}"
            if _up(started) and (not dashboard or _answers(started, f"{url}/api/version", token)):
                break
            started.stop()
        else:
            raise RuntimeError(f"no Ray head started here:\n{started.log.read_text(errors='replace')}")
        yield Head(f"127.0.0.1:{gcs}", url, folder, started, variables)


@contextmanager
def node(
    address: str, cpus: int = 1, resources: Mapping[str, float] | None = None, *, token: str | None = None
) -> Iterator[Node]:
    """`ray start --address`: one more node of the cluster at `address`."""
    variables = environment(token)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(_short_folder()))
        for attempt in range(ATTEMPTS):
            (agent,) = _free_ports(1)
            asked = [f"--address={address}", f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}"]
            started = _started(asked, cpus, resources, log=folder / f"node{attempt}.log", variables=variables)
            stack.callback(started.stop)
            if _up(started):
                break
            started.stop()
        else:
            raise RuntimeError(f"no Ray node started here:\n{started.log.read_text(errors='replace')}")
        yield started


def environment(token: str | None = None) -> dict[str, str]:
    """This process's, for commands that are about Ray: no other cluster's address, this Python's commands first.

    With `token` they and the cluster know each other by it; without, whoever reaches the ports is let in. A token that
    the user has for clusters of their own is left alone.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
    let_in = {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    return kept | PATIENCE | let_in | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1", "PATH": path}


def _started(
    asked: Sequence[str], cpus: int, resources: Mapping[str, float] | None, *, log: Path, variables: Mapping[str, str]
) -> Node:
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address=127.0.0.1",
        f"--num-cpus={cpus}", f"--resources={json.dumps(dict(resources or {}))}", "--object-store-memory=200000000",
        "--disable-usage-stats", *asked,
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=variables,
            cwd=log.parent,
            start_new_session=True,
        )
    return Node(process, log)


def _up(started: Node) -> bool:
    """Whether the node runs; `ray start` says so when it does."""
    until = time.monotonic() + START_S
    while started.alive and time.monotonic() < until:
        if "Ray runtime started" in started.log.read_text(errors="replace"):
            return True
        time.sleep(_LOOK_S)
    return False


def _answers(started: Node, url: str, token: str | None) -> bool:
    until = time.monotonic() + START_S
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    while started.alive and time.monotonic() < until:
        with suppress(OSError), urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.status == 200)
        time.sleep(_LOOK_S)
    return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _short_folder() -> Iterator[str]:
    """Short, as the names of sockets may have only 107 bytes."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _process(pid: int) -> Any:
    with suppress(psutil.Error):
        return psutil.Process(pid)
    return None
