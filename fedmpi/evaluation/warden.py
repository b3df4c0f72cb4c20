"""The program that holds foreign code: `python -I -S warden.py < order.json > verdict.json`. Standard library only.

Where the kernel allows, the code runs in namespaces of its own: a root that holds system folders (read-only), an empty working
folder of bounded size and nothing else; no network; a process tree that dies as one. Everywhere it runs under limits of time,
memory, files and processes, and whatever it started is dead before the verdict is given. It must never know a task.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
SET_PDEATHSIG, SET_DUMPABLE, SET_NO_NEW_PRIVS, SET_SUBREAPER = 1, 4, 38, 36
FIRST_UID, NUM_UIDS = 61184, 4000  # of dynamic users, so that each box has its own and its limits are not shared
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", "/opt")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
LOOK_S = 0.02
BOX = "/box"
SHOWN = 2000  # characters of output in a verdict
Order = dict[str, Any]
libc = ctypes.CDLL(None, use_errno=True)


def call(result: int, what: str) -> None:
    """A failed system call as an OSError."""
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    arguments = [word.encode() for word in (source, target, kind)]
    call(libc.mount(arguments[0], arguments[1], arguments[2], ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def enter_namespaces() -> None:
    """Namespaces for what is forked from now on. Root makes them directly; others through a user namespace."""
    wanted = NEW_IPC | NEW_PID | NEW_NET
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        call(libc.unshare(wanted), "unshare")
        return
    call(libc.unshare(wanted | NEW_USER), "unshare")
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def build_root(root: str, order: Order) -> None:
    """A root of system folders, the interpreter, a few devices and an empty box; then live in it.

    The mounts are this process's own: whoever tidies the temporary folder sees an empty one, and no system folder in it.
    """
    call(libc.unshare(NEW_NS), "unshare")
    mount("none", "/", "", REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=1m,mode=755")
    for folder in [*SYSTEM, *order["folders"]]:
        if os.path.islink(folder):
            os.symlink(os.readlink(folder), root + folder)
        elif os.path.isdir(folder) and not os.path.ismount(root + folder):
            os.makedirs(root + folder, exist_ok=True)
            mount(folder, root + folder, "", BIND | REC)
            mount("", root + folder, "", BIND | REMOUNT | RDONLY | NOSUID)
    os.mkdir(root + "/dev")
    for device in DEVICES:
        open(root + device, "w").close()
        mount(device, root + device, "", BIND)
    for folder in ("/proc", BOX):
        os.mkdir(root + folder)
    mount("proc", root + "/proc", "proc", NOSUID | NODEV)
    mount("tmpfs", root + BOX, "tmpfs", NOSUID | NODEV, f"size={order['disk_bytes']},mode=777,nr_inodes=4096")
    if not os.path.lexists(root + "/tmp"):  # unless a folder that is shown lies in it; TMPDIR tells programs of their box
        os.symlink(BOX, root + "/tmp")
    mount("", root, "", BIND | REMOUNT | RDONLY | NOSUID)
    os.chroot(root)


def drop_privileges(uid: int) -> None:
    """Root becomes a user that owns nothing, and nobody ever gets more rights."""
    libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def limit(step: Order, order: Order, others: int) -> None:
    """The limits of one step. `others` are processes that count against the same user already."""
    limits = {
        resource.RLIMIT_CPU: int(step["time_s"]) + 1,
        resource.RLIMIT_FSIZE: order["file_bytes"],
        resource.RLIMIT_NOFILE: order["open_files"],
        resource.RLIMIT_NPROC: order["processes"] + others,
        resource.RLIMIT_CORE: 0,
    }
    if step["memory_bytes"]:
        limits[resource.RLIMIT_AS] = step["memory_bytes"]
    for kind, value in limits.items():
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def write_files(folder: str, files: dict[str, str]) -> None:
    """The program's own files."""
    for name, text in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


def start(step: Order, order: Order, folder: str, output: int, results: int, others: int = 0) -> int:
    """Begin one step in a session of its own; gives its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        nothing = os.open("/dev/null", os.O_RDONLY)
        for number, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(number, target)
        os.chdir(folder)
        drop_privileges(order["uid"])
        limit(step, order, others)
        home = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        os.execvpe(step["argv"][0], step["argv"], {**home, **step["env"]})
    except BaseException as error:  # noqa: BLE001 - this process must end here, whatever happened
        os.write(results, (json.dumps({"error": f"{step['argv'][0]} could not be started: {error}"}) + "\n").encode())
    os._exit(127)


def inside(order: Order, root: str, results: int) -> None:
    """Process 1 of the namespaces: run the steps; when it ends, the kernel ends everything it left behind."""
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build_root(root, order)
    libc.prctl(SET_DUMPABLE, 0, 0, 0, 0)
    os.umask(0)
    write_files(BOX, order["files"])
    for number, step in enumerate(order["steps"]):
        output = os.memfd_create("output")
        os.write(results, (json.dumps({"step": number}) + "\n").encode())
        child = start(step, order, BOX, output, results)
        status = None
        while status is None:
            pid, ended = os.wait()
            status = ended if pid == child else None
        if not report(results, status, output):
            return


def report(results: int, status: int, output: int) -> bool:
    """Tell how a step ended; true when it went well."""
    code = os.waitstatus_to_exitcode(status)
    size = os.fstat(output).st_size
    text = os.pread(output, SHOWN, max(0, size - SHOWN)).decode("utf-8", "replace")
    os.write(results, (json.dumps({"code": code, "output": text}) + "\n").encode())
    return code == 0


def family(root: int) -> dict[int, int]:
    """Living descendants of a process, with their resident bytes, found by who is whose parent."""
    parents: dict[int, tuple[int, int]] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(name)] = (int(fields[1]), int(fields[21]) * page)
    found: dict[int, int] = {}
    todo = [root]
    while todo:
        parent = todo.pop()
        for pid, (its, size) in parents.items():
            if its == parent and pid not in found:
                found[pid] = size
                todo.append(pid)
    return found


def watch(child: int, order: Order, results: int) -> Order:
    """Wait for the steps, and end everything when time, memory or processes are used up. Gives the verdict."""
    os.set_blocking(results, False)
    told: list[Order] = []
    text, why = b"", None
    deadline = time.monotonic() + order["start_s"]
    over = False
    while not over and why is None:
        over = os.waitpid(child, os.WNOHANG)[0] == child
        with contextlib.suppress(BlockingIOError):
            text += os.read(results, 1 << 20)
        *lines, text = text.split(b"\n")
        for line in map(json.loads, lines):
            told.append(line)
            if "step" in line:
                deadline = time.monotonic() + order["steps"][line["step"]]["time_s"]
        if not over:
            why = exceeded(order, deadline)
            time.sleep(LOOK_S)
    if why:
        end_all(child)
    errors, began = [line["error"] for line in told if "error" in line], [line["step"] for line in told if "step" in line]
    return {"why": why, "errors": errors, "began": began, "steps": [line for line in told if "code" in line]}


def exceeded(order: Order, deadline: float) -> str | None:
    """What is used up, if anything."""
    if time.monotonic() > deadline:
        return "time"
    sizes = family(os.getpid())
    if len(sizes) > order["processes"] + 2:
        return "processes"
    return "memory" if sum(sizes.values()) > order["total_bytes"] else None


def end_all(child: int) -> None:
    """Nothing that was started is alive afterwards: not even what hides behind another parent, as this process reaps all."""
    while True:
        for pid in [child, *family(os.getpid())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(LOOK_S)


def outside(order: Order, folder: str, results: int) -> None:
    """The steps without namespaces, in a temporary folder."""
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.chmod(folder, 0o777)
    write_files(folder, order["files"])
    for number, step in enumerate(order["steps"]):
        output = os.memfd_create("output")
        os.write(results, (json.dumps({"step": number}) + "\n").encode())
        child = start(step, order, folder, output, results, same_user())
        if not report(results, os.waitpid(child, 0)[1], output):
            return


def same_user() -> int:
    """Threads of this user: the process limit counts all of them. Root becomes a user that has none."""
    if os.getuid() == 0:
        return 0
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return total


def main() -> None:
    """Read the order, isolate, run, give the verdict."""
    order = json.load(sys.stdin)
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(SET_SUBREAPER, 1, 0, 0, 0)
    order["uid"] = FIRST_UID + os.getpid() % NUM_UIDS
    isolated, reason = order["namespaces"], "" if order["namespaces"] else "not asked for"
    if isolated:
        try:
            enter_namespaces()
        except OSError as error:
            isolated, reason = False, str(error)
    reading, writing = os.pipe()
    folder = tempfile.mkdtemp(prefix="fedmpi-box-")
    child = os.fork()
    if not child:
        try:
            (inside if isolated else outside)(order, folder, writing)
        except BaseException as error:  # noqa: BLE001 - told in the verdict
            os.write(writing, (json.dumps({"error": str(error)}) + "\n").encode())
        os._exit(0)
    verdict = watch(child, order, reading)
    end_all(child)
    if isolated:
        os.rmdir(folder)  # it is empty, and never anything else is deleted
    else:
        shutil.rmtree(folder, ignore_errors=True)
    json.dump({**verdict, "isolated": isolated, "reason": reason}, sys.stdout)


if __name__ == "__main__":
    main()
