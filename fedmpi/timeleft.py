"""How long this job may still run: what the user says, else Slurm's time limit. It knows nothing of rounds."""

import math
import subprocess
import time
from collections.abc import Mapping

ASK_S = 20.0  # a controller that is busier than that is not waited for


def seconds(given: float | None, environ: Mapping[str, str]) -> float:
    """Seconds from now to the end of the job; infinite where nobody sets an end. One line where Slurm could not be asked."""
    job = environ.get("SLURM_JOB_ID")
    if given is not None or job is None:
        return math.inf if given is None else given
    if end := environ.get("SLURM_JOB_END_TIME"):
        return float(end) - time.time()
    asked = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S, check=True).stdout.strip()
        return parse(said)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        print(f"fedmpi: the time limit of job {job} is not known ({error}): --time_left_s tells it", flush=True)
        return math.inf


def parse(text: str) -> float:
    """Slurm's way to write a time: days-hours:minutes:seconds, less of it when there is less."""
    if text == "UNLIMITED":
        return math.inf
    days, dash, clock = text.rpartition("-")
    hours, minutes, rest = (["0", "0", *clock.split(":")])[-3:]
    return 86400.0 * int(days if dash else 0) + 3600 * int(hours) + 60 * int(minutes) + int(rest)
