"""A Slurm of two nodes on this machine, with all its files in one folder.

On Debian it needs the packages slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
NODES = ("node1", "node2")

# Sizes and GPUs are made up, so that scripts for real nodes are taken as they are.
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=bf_interval=2
KillWait=10
MinJobAge=3600
GresTypes=gpu
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:1
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:1
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Slurm's commands, spoken to the cluster in `folder`."""

    folder: Path

    def command(self, *words: str, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints; a failure is raised with all it said."""
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **variables},
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr or done.stdout}\n{self.logs()}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """`sbatch`; returns the job's id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd, **variables).strip()

    def states(self, job: str) -> dict[str, str]:
        """State of each task of a job array, by `job_task`."""
        text = self.command(
            "squeue", "--noheader", "--array", "--states=all", "--jobs", job, "--format=%i %T"
        )
        return dict(line.split() for line in text.splitlines())

    def wait_for(self, job: str, *wanted: str, timeout_s: float = 240) -> None:
        """Waits until every task of a job is in one of these states."""
        begun = time.monotonic()
        while not set((states := self.states(job)).values()) <= set(wanted):
            assert time.monotonic() - begun < timeout_s, f"{states}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
            for path in sorted(self.folder.glob("*.log"))
        )


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """Daemons with their files in `folder`; they end with the block.

    Raises:
        RuntimeError: Slurm is not installed, or did not start.
    """
    missing = [name for name in PROGRAMS if _path_of(name) is None]
    if missing:
        raise RuntimeError(
            f"{', '.join(missing)} missing: apt-get install --no-install-recommends "
            "slurmctld slurmd slurm-client munge"
        )
    (folder / "state").mkdir()
    config = CONFIG.format(folder=folder, user=getpass.getuser(), ports=_free_ports(3))
    (folder / "slurm.conf").write_text(config)
    (folder / "gres.conf").write_text("AutoDetect=off\nName=gpu File=/dev/null\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket"]
    munged += [f"--key-file={key}", f"--pid-file={folder}/munged.pid"]
    munged += [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    cluster = Cluster(folder=folder)
    with ExitStack() as stack:
        stack.enter_context(_daemon(folder, munged))
        while not (folder / "munge.socket").exists():
            time.sleep(0.05)
        stack.enter_context(_daemon(folder, ["slurmctld", "-D"]))
        for node in NODES:
            (folder / f"spool-{node}").mkdir()
            stack.enter_context(_daemon(folder, ["slurmd", "-D", "-N", node]))
        _wait_until_idle(cluster)
        yield cluster


def _wait_until_idle(cluster: Cluster) -> None:
    begun = time.monotonic()
    found = ""
    while found != "idle 2":
        if time.monotonic() - begun > 60:
            raise RuntimeError(f"nodes are {found!r} after a minute\n{cluster.logs()}")
        time.sleep(0.2)
        if (cluster.folder / "slurmctld.pid").exists():
            found = cluster.command("sinfo", "--noheader", "--format=%T %D").strip()


def _path_of(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextmanager
def _daemon(folder: Path, command: Sequence[str]) -> Iterator[None]:
    path = _path_of(command[0])
    assert path is not None
    with open(folder / f"{command[0]}.out", "ab") as output:
        process = subprocess.Popen(
            [path, *command[1:]],
            stdout=output,
            stderr=output,
            env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")},
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
