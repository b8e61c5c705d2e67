"""Waits for a search that runs as a job, brings its policies here, and exits as the search did.

    python bring_back.py ADDRESS JOB RUN OUTCOME

Files of a job stay on the head node, in the run folder RUN. So a second job prints the policies as text, which needs
nothing but the address of the cluster, and this script writes them into the folder OUTCOME.
"""

import base64
import binascii
import hashlib
import io
import shlex
import sys
import tarfile
import time
from pathlib import Path

from ray.job_submission import JobSubmissionClient

LOOK_S = 1.0
BUDGET_MISSED = 4
"""The exit code of a search whose policies are there all the same."""
BEGIN, END = "----begin----", "----end----"
"""Neither is base64."""
FILES = "*/policy.yaml */policy.safetensors */outcome.json */report.html"


def exit_code(client: JobSubmissionClient, job: str) -> int:
    """What the job's command exited with, once it is over; 1 where it never came to that."""
    while not client.get_job_status(job).is_terminal():
        time.sleep(LOOK_S)
    code = client.get_job_info(job).driver_exit_code
    return 1 if code is None else code


def packed(client: JobSubmissionClient, run: str) -> bytes:
    """The files as a tar archive, read from the log of a job that prints it, then its SHA-256."""
    command = (
        f"cd {shlex.quote(run)} && file=$(mktemp) && tar cz {FILES} > $file && echo {BEGIN} && base64 $file && "
        f"echo {END} && sha256sum < $file && rm $file"
    )
    job = client.submit_job(entrypoint=command)
    code, log = exit_code(client, job), client.get_job_logs(job)
    log = log.replace(
        f"Running entrypoint for job {job}: {command}\n", ""
    )  # Ray writes it anywhere, lines are no bounds
    text, _, rest = log.partition(f"{BEGIN}\n")[2].partition(f"{END}\n")
    try:
        archive = base64.b64decode(text)
    except binascii.Error:
        archive = b""
    if code != 0 or rest.split()[:1] != [hashlib.sha256(archive).hexdigest()]:
        sys.exit(f"the policies stay in {run} on the head node; the job {job} could not print them:\n{log[-2000:]}")
    return archive


def main(address: str, job: str, run: str, outcome: str) -> int:
    """Write the files below `outcome`; the exit code of the search."""
    client = JobSubmissionClient(address)
    code = exit_code(client, job)
    if code in (0, BUDGET_MISSED):
        with tarfile.open(fileobj=io.BytesIO(packed(client, run))) as archive:
            archive.extractall(outcome, filter="data")
        for policy in sorted(Path(outcome).glob("*/policy.yaml")):
            print(f"here: {policy}")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
