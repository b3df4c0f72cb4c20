"""Running foreign programs: what one is, its limits, and how it ended. The holding itself is done by warden.py, apart from us."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmpi.errors import EvaluationError

WARDEN = Path(__file__).with_name("warden.py")
GRACE_S = 60.0  # for the warden itself, on a busy machine
INTERPRETER = os.path.realpath(sys.executable)


@dataclass(frozen=True)
class Step:
    """One command, such as compiling or running. Memory 0 is for runtimes that reserve more than they use (Java, Go).

    Of this machine it reads system folders and `folders`; it writes to none of them.
    """

    argv: Sequence[str]
    time_s: float = 10.0
    memory_bytes: int = 2 << 30
    env: Mapping[str, str] = field(default_factory=dict)
    folders: Sequence[str] = ()


@dataclass(frozen=True)
class Limits:
    """What all steps share: bytes of a file and of all files, of all processes together, numbers of files and processes."""

    processes: int = 64
    open_files: int = 256
    file_bytes: int = 64 << 20
    disk_bytes: int = 256 << 20
    total_bytes: int = 3 << 30


@dataclass(frozen=True)
class Ending:
    """How a program ended: passed, or failed in step `step` with this code, or stopped because `why` was used up."""

    passed: bool
    step: int
    code: int | None
    why: str | None  # time, memory, processes
    output: str
    isolated: bool
    reason: str  # why it is not isolated


def run(files: Mapping[str, str], steps: Sequence[Step], limits: Limits = Limits(), namespaces: bool = True) -> Ending:
    """Run the steps one after the other, as long as each ends with 0, in an empty folder that holds the files."""
    own = [folder for step in steps for folder in step.folders]
    order: dict[str, Any] = {
        "files": dict(files),
        "steps": [
            {"argv": list(step.argv), "time_s": step.time_s, "memory_bytes": step.memory_bytes, "env": dict(step.env)}
            for step in steps
        ],
        **vars(limits),
        "folders": sorted({sys.base_prefix, os.path.dirname(os.path.dirname(INTERPRETER)), *own} - {"/usr", "/"}),
        "namespaces": namespaces,
        "start_s": GRACE_S,
    }
    longest = GRACE_S * 2 + sum(step.time_s for step in steps)
    process = subprocess.Popen(
        [INTERPRETER, "-I", "-S", str(WARDEN)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={"PATH": os.defpath},
    )
    try:
        said, complaint = process.communicate(json.dumps(order).encode(), timeout=longest)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise EvaluationError(f"the sandbox gave no verdict in {longest:.0f} s: the machine is overloaded, or no Linux") from None
    if process.returncode or complaint:
        reason = (complaint.decode(errors="replace").strip() or f"exit code {process.returncode}").splitlines()[-1]
        raise EvaluationError(f"the sandbox failed: {reason}; it needs Linux")
    verdict = json.loads(said)
    if verdict["errors"]:
        raise EvaluationError(f"the sandbox failed: {verdict['errors'][0]}")
    return _ending(verdict, len(steps))


def _ending(verdict: Mapping[str, Any], num_steps: int) -> Ending:
    done = verdict["steps"]
    last: Mapping[str, Any] = done[-1] if done else {"code": None, "output": ""}
    passed = verdict["why"] is None and len(done) == num_steps and all(step["code"] == 0 for step in done)
    step = max(verdict["began"], default=0)
    output = "" if verdict["why"] and len(done) <= step else last["output"]
    code = None if verdict["why"] else last["code"]
    return Ending(passed, step, code, verdict["why"], output, verdict["isolated"], verdict["reason"])
