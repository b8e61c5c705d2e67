"""The example of a Ray cluster: its files are what their readers take, and its job runs from end to end.

The cluster is on this machine: a head that takes jobs, and one more node that is the target. What needs a cloud or
Kubernetes is held against what Ray and KubeRay ask of such files.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from autoprune.cli import app
from autoprune.config import load_config
from autoprune.engines.settings import TARGET
from autoprune.files import read_policy

ray = pytest.importorskip("ray", reason="pip install 'autoprune[ray]'")
pytest.importorskip("aiohttp_cors", reason="jobs need Ray's dashboard: pip install 'ray[default]'")

from ray_heads import Head, head, node  # noqa: E402
from typer.main import get_command  # noqa: E402

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_cluster"
RAY = "2.60.0"
LIMIT_S = 1500
"""Far above what a job takes, for machines that are busy."""
TRIALS = 12
TOKEN = "0123456789abcdef0123456789abcdef"


# What its files are


def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLE / "rayjob.yaml").read_text(encoding="utf-8")))


def groups() -> dict[str, dict[str, Any]]:
    cluster = manifests()[1]["spec"]["rayClusterSpec"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]


def commands() -> list[list[str]]:
    """Every command of the README, and those that its files run."""
    blocks = re.findall(r"^```console\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`((?:ray|autoprune) [^`]*)`", (EXAMPLE / "README.md").read_text())
    lines.append(manifests()[1]["spec"]["entrypoint"])
    cluster = yaml.safe_load((EXAMPLE / "cluster.yaml").read_text(encoding="utf-8"))
    lines += [line.rpartition("; ")[2] for kind in ("head", "worker") for line in cluster[f"{kind}_start_ray_commands"]]
    return [shlex.split(line) for line in lines if line.startswith(("ray ", "autoprune "))]


def test_launcher_takes_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415

    written = yaml.safe_load((EXAMPLE / "cluster.yaml").read_text(encoding="utf-8"))
    cluster = prepare_config(written)
    validate_config(cluster)
    kinds = cluster["available_node_types"]
    assert [name for name, kind in kinds.items() if TARGET in kind["resources"]] == ["target"]
    assert kinds["target"]["resources"][TARGET] == 1
    assert (kinds["target"]["min_workers"], kinds["target"]["max_workers"]) == (1, 1)
    assert kinds["worker"]["min_workers"] == 0 < kinds["worker"]["max_workers"]
    assert cluster["max_workers"] >= kinds["worker"]["max_workers"] + 1
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{RAY}-py311")


def test_launcher_refuses_what_is_no_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415

    written = yaml.safe_load((EXAMPLE / "cluster.yaml").read_text(encoding="utf-8"))
    written["available_node_types"]["target"]["workers"] = 1
    with pytest.raises(Exception, match="'workers' was unexpected"):
        validate_config(prepare_config(written))


def test_versions_are_those_of_the_constraints() -> None:
    assert f"ray=={RAY}" in (EXAMPLE.parents[1] / "constraints.txt").read_text().splitlines()
    assert f"FROM rayproject/ray:{RAY}-py311-cpu" in (EXAMPLE / "Dockerfile").read_text().splitlines()
    assert manifests()[1]["spec"]["rayClusterSpec"]["rayVersion"] == RAY


def test_rayjob_is_one_job_with_its_own_cluster() -> None:
    claim, job = manifests()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["shutdownAfterJobFinishes"] is True
    assert isinstance(spec["backoffLimit"], int)
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert len(job["metadata"]["name"]) <= 47  # KubeRay's limit
    assert list(groups()) == ["head", "workers", "target"]
    for group in groups().values():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert [container["image"] for container in pod(group)["containers"]] == ["REGISTRY/autoprune:0.1.0"]
    for group in list(groups().values())[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

    volumes = {volume["name"]: volume for volume in pod(groups()["head"])["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod(groups()["head"])["containers"][0]["volumeMounts"]}
    run = Path(spec["entrypoint"].split("--run ")[1].split()[0])
    assert volumes[mounts[str(run.parent)]]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert "configMap" in volumes[mounts["/project"]]


def test_rayjob_has_one_target_with_cpus_of_its_own() -> None:
    target = groups()["target"]
    assert [name for name, group in groups().items() if TARGET in str(group["rayStartParams"])] == ["target"]
    assert (target["replicas"], target["minReplicas"], target["maxReplicas"]) == (1, 1, 1)
    (argument,) = shlex.split(target["rayStartParams"]["resources"])  # as the shell reads what KubeRay writes
    assert json.loads(argument) == {TARGET: 1}
    assert pod(target)["nodeSelector"]
    resources = pod(target)["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"]


def test_there_are_commands() -> None:
    assert {tuple(command[:2]) for command in commands()} >= {
        ("ray", "start"), ("ray", "up"), ("ray", "job"), ("autoprune", "search"),
    }  # fmt: skip


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_has_flags_that_exist(command: list[str]) -> None:
    from ray.scripts.scripts import cli  # noqa: PLC0415

    name, *rest = command
    found: Any = cli if name == "ray" else get_command(app)
    while hasattr(found, "commands"):
        word = rest.pop(0)
        assert word in found.commands, f"{name} has no command {word}"
        found = found.commands[word]
    if rest:
        found.make_context(name, rest)


def test_flags_of_submit_exist() -> None:
    text = (EXAMPLE / "submit.sh").read_text(encoding="utf-8")
    line = re.search(r"^(ray job submit .*?) \|\| true$", text.replace("\\\n", " "), flags=re.MULTILINE)
    assert line is not None
    test_command_has_flags_that_exist([word for word in shlex.split(line[1]) if word != "$@"])


def test_submit_says_how_it_is_used() -> None:
    for given in ([], ["http://127.0.0.1:8265"], ["http://127.0.0.1:8265", "runs/relative"]):
        done = subprocess.run([EXAMPLE / "submit.sh", *given], capture_output=True, text=True, check=False)
        assert done.returncode == 64
        assert "./submit.sh ADDRESS RUN" in done.stderr


def test_search_is_one() -> None:
    config = load_config(EXAMPLE / "autoprune.yaml", {})
    assert (config.search.engine, config.budgets[0].text) == ("ray", "50%macs")


# A job, on a cluster that is real


class Submitted(NamedTuple):
    code: int
    log: str


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(cpus=2, token=TOKEN) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example. The first job trains its model."""
    copied = tmp_path_factory.mktemp("copy") / "ray_cluster"
    left_out = shutil.ignore_patterns("runs", "outcome", "weights.safetensors", "__pycache__")
    shutil.copytree(EXAMPLE, copied, ignore=left_out)
    return copied


def submitted(cluster: Head, folder: Path, tmp_path: Path, *flags: str) -> Submitted:
    """What `submit.sh` did; its log stays in `tmp_path`, and is shown where a test fails."""
    log = tmp_path / "submit.log"
    with log.open("wb") as file:
        code = subprocess.run(
            ["./submit.sh", cluster.jobs, str(tmp_path / "run of a job"), *flags], cwd=folder, timeout=LIMIT_S,
            env=cluster.environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False,
        ).returncode  # fmt: skip
    print(text := log.read_text(encoding="utf-8"))
    return Submitted(code, text)


@pytest.mark.slow
def test_a_job_without_a_target_says_so(cluster: Head, folder: Path, tmp_path: Path) -> None:
    done = submitted(cluster, folder, tmp_path, "--budget", "50%latency", "--ray-target-wait", "5")
    assert done.code == 2
    error = done.log.partition("error: ")[2]
    assert TARGET in error
    assert "ray start --address=" in error
    assert "Traceback" not in done.log
    assert "here: " not in done.log


def test_a_job_searches_and_its_policy_comes_back(cluster: Head, folder: Path, tmp_path: Path) -> None:
    with node(cluster.address, resources={TARGET: 1}, token=TOKEN):
        done = submitted(cluster, folder, tmp_path, "--trials", str(TRIALS))
    assert done.code == 0
    assert f"ray {ray.__version__}: 2 nodes, 3 CPUs, 1 x {TARGET}" in done.log
    assert re.search(r"^met: macs ", done.log, flags=re.MULTILINE)
    path = folder / "outcome" / "50pctmacs" / "policy.yaml"
    policy = read_policy(path)
    assert policy.units
    assert f"here: {path}" in done.log
    assert path.read_bytes() == (tmp_path / "run of a job" / "50pctmacs" / "policy.yaml").read_bytes()
    assert (path.parent / policy.weights).is_file()
