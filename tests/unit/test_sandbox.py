"""The sandbox: honest programs end as they should, hostile ones reach nothing, and nothing outlives the verdict."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmpi.errors import EvaluationError
from fedmpi.evaluation.sandbox import INTERPRETER, Ending, Limits, Step, run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of Linux namespaces")
SMALL = Limits(processes=24, total_bytes=512 << 20, file_bytes=1 << 20, disk_bytes=4 << 20)


def python(code: str, time_s: float = 10.0, memory_bytes: int = 512 << 20, **options) -> Ending:
    return run({"program.py": code}, [Step([INTERPRETER, "-I", "program.py"], time_s, memory_bytes)], SMALL, **options)


def need_namespaces() -> None:
    ending = python("pass")
    if not ending.isolated:
        pytest.skip(f"this kernel gives no namespaces ({ending.reason}); limits alone hold programs here")


def alive(mark: str) -> list[str]:
    """Processes whose command line holds the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(entry.name)
            except OSError:
                continue
    return found


def test_an_honest_program_passes_and_a_failing_one_tells_why():
    ending = python("print('hello')")
    assert (ending.passed, ending.code, ending.why, ending.output) == (True, 0, None, "hello\n")
    ending = python("assert 1 == 2, 'sums differ'")
    assert not ending.passed and ending.code == 1 and "sums differ" in ending.output


def test_steps_run_in_order_up_to_the_first_that_fails():
    shell = ["/bin/sh", "-c"]
    steps = [Step([*shell, "echo one > made"]), Step([*shell, "cat made; exit 3"]), Step([*shell, "echo never"])]
    ending = run({}, steps, SMALL)
    assert (ending.passed, ending.step, ending.code, ending.output) == (False, 1, 3, "one\n")


def test_a_program_that_cannot_be_started_is_no_wrong_answer():
    with pytest.raises(EvaluationError, match="/nowhere could not be started"):
        run({}, [Step(["/nowhere"])], SMALL)


@pytest.mark.parametrize("namespaces", [True, False])
def test_an_endless_loop_ends(namespaces):
    ending = run({}, [Step(["/bin/sh", "-c", "while true; do :; done"], time_s=1.0)], SMALL, namespaces)
    assert (ending.passed, ending.code, ending.why) == (False, None, "time")


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_sleeper_ends(namespaces):
    assert run({}, [Step(["/bin/sh", "-c", "sleep 1000"], time_s=1.0)], SMALL, namespaces).why == "time"


@pytest.mark.parametrize("namespaces", [True, False])
def test_children_that_outlive_their_parent_are_killed(namespaces):
    """The parent ends at once and well; its child has a session and a parent of its own."""
    mark = f"31.{os.getpid()}{int(namespaces)}"
    ending = run({}, [Step(["/bin/sh", "-c", f"(setsid sleep {mark} &) ; exit 0"])], SMALL, namespaces)
    assert ending.passed and not alive(mark)


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_fork_bomb_is_held(namespaces):
    """Under its limits a bomb gets so many processes and no more; afterwards none is left."""
    mark = f"32.{os.getpid()}{int(namespaces)}"
    bomb = f"for i in 1 2 3 4 5 6 7 8; do for j in 1 2 3 4 5 6 7 8; do sleep {mark} & done; done; wait"
    ending = run({}, [Step(["/bin/sh", "-c", bomb], time_s=3.0)], SMALL, namespaces)
    assert not ending.passed and not alive(mark)


def test_a_fork_bomb_of_python_is_held():
    code = (
        "import contextlib, os, time\nfor _ in range(6):\n    with contextlib.suppress(OSError):\n        os.fork()\ntime.sleep(30)"
    )
    ending = python(code, time_s=2.0)
    assert not ending.passed and ending.why in ("time", "processes")


def test_a_memory_eater_gets_no_more_than_its_limit():
    ending = python("x = bytearray(600 << 20)")
    assert not ending.passed and "MemoryError" in ending.output


def test_processes_together_get_no_more_than_theirs():
    code = "import os, time\nfor _ in range(3):\n    os.fork()\nx = b'x' * (200 << 20)\ntime.sleep(30)"
    assert python(code, time_s=20.0).why == "memory"


def test_large_files_and_full_disks_are_refused():
    assert not python("open('big', 'wb').write(b'x' * (2 << 20))").passed
    need_namespaces()
    ending = python("for i in range(9): open(str(i), 'wb').write(b'x' * (1 << 19))")
    assert not ending.passed and "No space left" in ending.output


def test_nothing_outside_the_box_can_be_written_or_read(tmp_path):
    need_namespaces()
    (tmp_path / "secret").write_text("mine")
    os.chmod(tmp_path, 0o777)
    places = [
        str(tmp_path / "new"),
        "/usr/new",
        "/etc/new",
        "/new",
        "/dev/new",
        "/proc/sys/kernel/hostname",
        str(Path.home() / "new"),
    ]
    code = f"""
for place in {places!r}:
    try:
        open(place, "w").write("x")
    except OSError:
        continue
    print("wrote", place)
try:
    print("read", open({str(tmp_path / "secret")!r}).read())
except OSError:
    print("blind")
"""
    ending = python(code)
    assert ending.passed and ending.output == "blind\n"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_there_is_no_network_and_no_way_to_more_rights():
    need_namespaces()
    code = """
import ctypes, os, socket
for address in (("127.0.0.1", 22), ("192.0.2.1", 80)):
    try:
        socket.create_connection(address, timeout=2)
        print("connected")
    except OSError as error:
        pass
libc = ctypes.CDLL(None)
print(libc.mount(b"none", b"/box", b"tmpfs", 0, b""), libc.chroot(b"/usr"), len([p for p in os.listdir("/proc") if p.isdigit()]))
try:
    os.kill(1, 9)
except OSError:
    pass
print("end")
"""
    ending = python(code)
    assert ending.passed and ending.output == "-1 -1 2\nend\n"


def test_the_box_is_new_every_time():
    assert python("import os; print(sorted(os.listdir('.'))); open('left', 'w')").output == "['program.py']\n"
    assert python("import os; print(sorted(os.listdir('.')))").output == "['program.py']\n"


def test_a_program_dies_with_the_process_that_wanted_it():
    mark = f"33.{os.getpid()}"
    code = f"from fedmpi.evaluation.sandbox import *; run({{}}, [Step(['/bin/sleep', '{mark}'], time_s=60.0)])"
    asking = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    sleeping = ["/bin/sleep\0" + mark]
    deadline = time.monotonic() + 30
    while not alive(sleeping[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    asking.kill()
    asking.wait()
    while alive(sleeping[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(sleeping[0])


def test_a_folder_of_a_step_is_read_and_never_written(tmp_path):
    need_namespaces()
    (tmp_path / "library").write_text("shared")
    (tmp_path / "library").chmod(0o666)
    os.chmod(tmp_path, 0o777)
    script = f"cat {tmp_path}/library; echo mine > {tmp_path}/library || echo mine > {tmp_path}/new"
    ending = run({}, [Step(["/bin/sh", "-c", script], folders=[str(tmp_path)])], SMALL)
    assert not ending.passed and ending.output.startswith("shared") and "Read-only" in ending.output
    assert (tmp_path / "library").read_text() == "shared" and [path.name for path in tmp_path.iterdir()] == ["library"]
