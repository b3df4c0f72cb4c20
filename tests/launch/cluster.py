"""A real Slurm of several virtual nodes for the tests: own munged, slurmctld and slurmds, own configuration and state.

Every daemon runs in the foreground as a child of the test process, so that it is stopped by the process id we hold, and
asks the kernel to be stopped when the test process is killed (slurmctld, which changes its credentials, does not hear
of that). Nothing below /etc is read or written.

With root, each slurmd lives in a network and host-name namespace of its own: nodes have addresses, names and a /dev/shm
as separate machines have. Without, all of them listen on the loopback address and `separate_hosts` is False.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "srun", "sbatch", "scontrol", "squeue", "scancel", "sinfo", "setpriv")
SYSTEM_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
START_S = 60

CONFIGURATION = """\
ClusterName=fedmpi
SlurmctldHost={host}({head})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/spool.%n
TmpFS={state}/tmp.%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd.%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=5
SlurmdTimeout=60
MessageTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
"""
# cred_expire is also how long a requeued job waits before it starts again. TmpFS: srun's pmix plugin keeps a folder
# there that two nodes must not share. linuxproc and no task plugin: nothing here may need cgroups.

IN_NAMESPACE = """\
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
hostname "$2"
shift 2
exec "$@"
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]


def wait_for(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until `done()`; a TimeoutError names what was waited for."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.2)


@dataclass(frozen=True)
class Cluster:
    """A running cluster, and the few commands of a user."""

    state: Path
    nodes: tuple[str, ...]
    separate_hosts: bool
    environ: dict[str, str]

    def run(self, *command: str, timeout_s: float = 120, check: bool = True, **more: str) -> str:
        """Output of one command, Slurm's or the shell's, with the environment of the cluster."""
        done = subprocess.run(command, env=self.environ | more, capture_output=True, text=True, timeout=timeout_s, cwd=self.state)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(command)} exited {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def submit(self, *command: str, **more: str) -> str:
        """The number of the job that was submitted."""
        return self.run("sbatch", "--parsable", *command, **more).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """Wait until the job is in one of `states`, by default until it has ended."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        wait_for(lambda: self.job(number)["JobState"] in wanted, timeout_s, f"job {number} to be {' or '.join(wanted)}")
        return self.job(number)


@contextmanager
def running_cluster(num_nodes: int = 3, cpus: int = 8) -> Iterator[Cluster]:
    """Start the daemons, wait until every node is idle, and take all of it down again."""
    state = Path(tempfile.mkdtemp(prefix="fedmpi-slurm-"))  # a short path: munge's socket may have 107 characters
    state.chmod(0o755)
    names = tuple(f"node{i}" for i in range(1, num_nodes + 1))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, state, ignore_errors=True)
        prefixes = _namespaces(state, names, stack)
        head = prefixes.pop("head", [""])[0]
        environ = _configure(state, names, cpus, head)
        _start_daemons(state, environ, names, prefixes, stack)
        cluster = Cluster(state, names, bool(head), environ)
        stack.callback(_end_jobs, cluster)
        try:
            wait_for(lambda: _num_idle(cluster) == num_nodes, START_S, f"{num_nodes} idle nodes")
        except TimeoutError as error:
            logs = "".join(f"\n== {log.name}\n{log.read_text()[-2000:]}" for log in sorted(state.glob("*.log")))
            raise TimeoutError(f"{error}{logs}") from None
        yield cluster


def _num_idle(cluster: Cluster) -> int:
    listed = cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False)
    return sum(name in cluster.nodes for name in listed.split())


def _configure(state: Path, names: tuple[str, ...], cpus: int, head: str) -> dict[str, str]:
    for folder in ("controller", "munge", *(f"{kind}.{name}" for name in names for kind in ("spool", "tmp"))):
        (state / folder).mkdir(mode=0o755)
    (state / "munge" / "key").write_bytes(os.urandom(128))
    (state / "munge" / "key").chmod(0o600)
    ports = _free_ports(1 + len(names))
    host = socket.gethostname().split(".")[0]
    lines = [CONFIGURATION.format(host=host, head=head or "127.0.0.1", port=ports[0], user=_user(), state=state)]
    for name, port, address in zip(names, ports[1:], _addresses(head, len(names)), strict=True):
        lines.append(
            f"NodeName={name} NodeHostname={name if head else host} NodeAddr={address} Port={port} CPUs={cpus} "
            "RealMemory=8000 State=UNKNOWN\n"
        )
    lines.append(f"PartitionName=main Nodes={','.join(names)} Default=YES MaxTime=INFINITE State=UP\n")
    (state / "slurm.conf").write_text("".join(lines))
    (state / "cgroup.conf").touch()
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "PMI", "OMPI_COMM", "MPI_"))}
    return outside | {"SLURM_CONF": str(state / "slurm.conf"), "PATH": SYSTEM_PATH}


def _user() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()


def _addresses(head: str, count: int) -> list[str]:
    return [f"{head.rpartition('.')[0]}.{i}" if head else "127.0.0.1" for i in range(1, count + 1)]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _start_daemons(
    state: Path, environ: dict[str, str], names: tuple[str, ...], prefixes: dict[str, list[str]], stack: ExitStack
) -> None:
    munge = state / "munge"
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={munge / file}" for option, file in files.items()]
    _daemon(state, environ, "munged", ["munged", "--foreground", "--num-threads=2", *options], stack)
    wait_for((munge / "socket").exists, START_S, "munged's socket")
    _daemon(state, environ, "slurmctld", ["slurmctld", "-D"], stack)
    for name in names:
        _daemon(state, environ, f"slurmd.{name}", [*prefixes.get(name, []), "slurmd", "-D", "-N", name], stack)


def _daemon(state: Path, environ: dict[str, str], name: str, command: list[str], stack: ExitStack) -> None:
    with (state / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=state,
        )  # fmt: skip
    stack.callback(_stop, process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_jobs(cluster: Cluster) -> None:
    """Cancel what is left and end every slurmstepd of this cluster, which would outlive its slurmd."""
    with suppress(subprocess.TimeoutExpired, TimeoutError):
        if cluster.run("squeue", "-h", "-o", "%A", check=False, timeout_s=10).strip():
            cluster.run("scancel", "--signal=KILL", "--full", "--user", _user(), check=False, timeout_s=10)
            cluster.run("scancel", "--user", _user(), check=False, timeout_s=10)
            wait_for(lambda: not cluster.run("squeue", "-h", check=False, timeout_s=10).strip(), 20, "an empty queue")
    ours = f"SLURM_CONF={cluster.state / 'slurm.conf'}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "comm").read_text().strip() == "slurmstepd" and ours in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def _namespaces(state: Path, names: tuple[str, ...], stack: ExitStack) -> dict[str, list[str]]:
    """A command prefix per node that puts a daemon into it, and the head's address; nothing where it is not allowed."""
    tools = ("ip", "nsenter", "unshare", "mount", "hostname")
    if os.geteuid() != 0 or any(shutil.which(tool, path=SYSTEM_PATH) is None for tool in tools):
        return {}
    subnet, tag = _free_subnet(), f"fm{os.getpid()}"
    try:
        return _wire_up(state, names, subnet, tag, stack)
    except subprocess.CalledProcessError as error:
        print(f"no network namespaces, nodes share the loopback address: {error.stderr}")
        return {}


def _wire_up(state: Path, names: tuple[str, ...], subnet: str, tag: str, stack: ExitStack) -> dict[str, list[str]]:
    bridge, head = f"{tag}b", f"{subnet}.254"
    _undoable(stack, f"ip link add {bridge} type bridge", f"ip link del {bridge}")
    _ip(f"addr add {head}/24 dev {bridge}", f"link set {bridge} up")
    known = {head: f"head {socket.gethostname()}"} | {f"{subnet}.{i}": name for i, name in enumerate(names, 1)}
    hosts = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in known.items())]
    (state / "hosts").write_text("\n".join(hosts) + "\n")
    # no resolver is reachable in there; without this line torch's store waits seconds for every reverse look-up
    (state / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    prefixes = {"head": [head]}
    for number, name in enumerate(names, 1):
        space, link = f"{tag}n{number}", f"{tag}v{number}"
        _undoable(stack, f"ip netns add {space}", f"ip netns del {space}")
        _ip(f"link add {link} type veth peer name eth0 netns {space}", f"link set {link} master {bridge} up")
        _ip(
            f"-n {space} addr add {subnet}.{number}/24 dev eth0",
            f"-n {space} link set lo up",
            f"-n {space} link set eth0 up",
        )
        # not `ip netns exec`: it mounts a new /sys over the old, and slurmd then finds no cgroup file system and ends
        enter = ["nsenter", f"--net=/run/netns/{space}", "unshare", "--uts", "--mount", "--propagation", "private"]
        prefixes[name] = [*enter, "sh", "-ec", IN_NAMESPACE, "sh", str(state), name]
    return prefixes


def _ip(*commands: str) -> None:
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)


def _undoable(stack: ExitStack, command: str, undo: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)
    stack.callback(subprocess.run, undo.split(), capture_output=True)


def _free_subnet() -> str:
    found = subprocess.run(["ip", "-j", "-4", "addr"], check=True, capture_output=True, text=True).stdout
    taken = {info["local"].rpartition(".")[0] for link in json.loads(found) for info in link["addr_info"]}
    return next(subnet for subnet in (f"10.77.{i}" for i in range(256)) if subnet not in taken)
