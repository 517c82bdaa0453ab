"""A real Slurm of two nodes on one machine, for tests of job files: Debian's slurmctld and slurmd on tests/nodes.py.

    node 0       the controller: munged, slurmctld, and where the tests submit from
    nodes 1, 2   slurmd; each with its own network, processes, host name and /dev/shm. The disk is everybody's.
    gpu-[1-16]   nodes in the cloud with 8 GPUs each, never started: the scheduler says whether a job would fit them

Processes are tracked by the freezer cgroup, as in production: with another tracker every process of a job gets the
signals, and a job file that forgets to pass them on would pass its tests.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.nodes import Node, cluster, nodes_available

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "hostname")
_MUNGE_FILES = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
_FREEZER = Path("/sys/fs/cgroup/freezer")
_UP_SECONDS = 40.0
_POLL_SECONDS = 0.2
_SETTLED_SECONDS = 3.0

# cred_expire (5 at least) is how long a requeued job waits. SlurmdTimeout: a node that is silent for so long is lost.
# KillWait: what scancel leaves a job between TERM and KILL. MinJobAge: finished jobs stay visible.
_CONFIGURATION = """\
ClusterName=hypershard
SlurmctldHost=ctl({controller})
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
ReturnToService=1
JobRequeue=1
SlurmctldTimeout=30
SlurmdTimeout=6
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=15
KillWait={kill_wait}
CompleteWait=0
MinJobAge=86400
SlurmdParameters=config_overrides
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=INFINITE
{nodes}
NodeName=gpu-[1-16] CPUs=192 RealMemory=2000000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes={names} Default=YES PriorityTier=10 MaxTime=INFINITE
PartitionName=low  Nodes={names} PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes={names} PriorityTier=100 PreemptMode=OFF MaxTime=INFINITE
PartitionName=gpus Nodes=gpu-[1-16] MaxTime=INFINITE
"""


def slurm_available() -> str | None:
    """Why there can be no Slurm here, or None when there can."""
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"a Slurm cluster needs {', '.join(missing)}"
    if not _FREEZER.is_dir():
        return f"a Slurm cluster needs the freezer cgroup at {_FREEZER}"
    return nodes_available()


class Slurm:
    """A running cluster. Use `slurm` to make one."""

    def __init__(self, folder: Path, nodes: list[Node], kill_wait: int):
        self._folder = folder
        self._controller, *computers = nodes
        # The freezer's folders are named by node: two test processes must not share them.
        self.nodes = {f"n{os.getpid()}-{node.number}": node for node in computers}
        self.names = list(self.nodes)
        self._configuration = str(folder / "slurm.conf")
        self._environment = {**os.environ, "SLURM_CONF": self._configuration}
        self._write_configuration(kill_wait)

    def _write_configuration(self, kill_wait: int) -> None:
        folder = self._folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        lines = [
            f"NodeName={name} NodeAddr={node.address} CPUs=64 RealMemory=500000 State=UNKNOWN"
            for name, node in self.nodes.items()
        ]
        text = _CONFIGURATION.format(
            folder=folder,
            controller=self._controller.address,
            kill_wait=kill_wait,
            nodes="\n".join(lines),
            names=",".join(self.names),
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\n")
        (folder / "gres.conf").write_text("AutoDetect=off\n")
        addresses = {"ctl": self._controller.address, **{name: node.address for name, node in self.nodes.items()}}
        hosts = "".join(f"{address} {name}\n" for name, address in addresses.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def start(self) -> None:
        folder = self._folder
        keys = [f"--{name}={folder}/munge.{end}" for name, end in _MUNGE_FILES.items()]
        self._daemon(self._controller, "ctl", ["munged", "--foreground", "--force", *keys])
        _until((folder / "munge.socket").exists, "munged")
        self._daemon(self._controller, "ctl", ["slurmctld", "-D", "-i", "-c"])
        for name, node in self.nodes.items():
            self._daemon(node, name, ["slurmd", "-D", "-N", name])
        _until(lambda: self.states() == dict.fromkeys(self.names, "idle"), "idle nodes")

    def _daemon(self, node: Node, host: str, argv: list[str]) -> None:
        """Start a daemon whose machine is called `host` and knows the others by name."""
        script = 'mount --bind "$1" /etc/hosts && hostname "$2" && shift 2 && exec "$@"'
        words = ["unshare", "--uts", "sh", "-c", script, "sh", str(self._folder / "hosts"), host, *argv]
        with (self._folder / f"{Path(argv[0]).name}-{host}.out").open("a") as output:
            node.start(words, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's as a user does."""
        return self._controller.run(argv, env=self._environment, check=check, timeout=60)

    def submit(self, *words: str, variables: Mapping[str, str] | None = None) -> str:
        """sbatch with `words` in the environment `variables` (None: this process's); the job's number."""
        environment = {**(os.environ if variables is None else variables), "SLURM_CONF": self._configuration}
        done = self._controller.run(["sbatch", "--parsable", *words], env=environment, timeout=60)
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, Reason, NodeList, ..."""
        said = self.run("scontrol", "-o", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait(self, number: str, states: str, *, seconds: float = 120.0) -> dict[str, str]:
        """The job once its state is one of `states`, words with spaces between."""
        found: dict[str, str] = {}

        def is_there() -> bool:
            found.update(self.job(number))
            return found["JobState"] in states.split()

        _until(is_there, lambda: f"job {number} to be {states}: {found}", seconds=seconds)
        return found

    def states(self) -> dict[str, str]:
        """Node -> its state, without the marks that Slurm adds."""
        said = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T", check=False).stdout
        return {line.split()[0]: line.split()[1].strip("*~#$@+-") for line in said.splitlines()}

    def lose(self, name: str) -> None:
        """Power cut at a node."""
        self.nodes[name].lose()

    def bring_back(self, name: str) -> None:
        """The node starts again and is taken back into service, as an operator does it."""
        node = self.nodes[name]
        node.come_back()
        self._daemon(node, name, ["slurmd", "-D", "-b", "-N", name])

        well_since: list[float] = []

        def is_well() -> bool:
            """For some seconds: a boot time is rounded, and a second registration may look like a second reboot."""
            state = self.states().get(name, "")
            if state.startswith("down"):
                self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
            if state not in ("idle", "allocated", "mixed"):
                well_since.clear()
                return False
            well_since.append(time.monotonic())
            return well_since[-1] - well_since[0] > _SETTLED_SECONDS

        _until(is_well, f"{name} to be back")

    def empty(self) -> None:
        """Cancel all jobs and wait until nothing runs."""
        self.run("scancel", "--user=root", check=False)
        self.wait_until_idle()

    def wait_until_idle(self) -> None:
        _until(lambda: not self.run("squeue", "--noheader").stdout.strip(), "an empty queue")

    def clean(self) -> None:
        """Remove the freezer's folders, which outlive the daemons, and those of test processes that were killed."""
        for top in _FREEZER.glob("slurm_n*-*"):
            owner = top.name.removeprefix("slurm_n").partition("-")[0]
            if owner != str(os.getpid()) and Path(f"/proc/{owner}").exists():
                continue
            for folder in sorted(top.glob("**/"), key=lambda path: len(path.parts), reverse=True):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _until(
    is_so: Callable[[], bool],
    what: str | Callable[[], str],
    *,
    seconds: float = _UP_SECONDS,
    poll: float = _POLL_SECONDS,
) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(poll)


@contextlib.contextmanager
def slurm(folder: Path, *, num_nodes: int = 2, kill_wait: int = 7) -> Iterator[Slurm]:
    """A cluster whose files are under `folder`; all of it ends with the block."""
    with cluster(num_nodes + 1, shm_bytes=512 * 2**20) as nodes:
        made = Slurm(folder, nodes, kill_wait)
        try:
            made.start()
            yield made
        finally:
            for node in nodes:
                node.close()
            made.clean()
