"""A real SLURM for tests: munged, slurmctld and two slurmd on this machine, loopback only, started and stopped here.

Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm slurm-client munge
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm slurm-client munge"
NODES = ("127.0.0.1", "127.0.0.2")
"""Names that resolve without a hosts file: Lightning's ranks meet at the first node's name."""

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credential is out of date, two minutes by default.
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdLogFile={root}/slurmd-%n.log
SlurmdSpoolDir={root}/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
MinJobAge=3600
FirstJobId={first_job}
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=4000
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=4000
PartitionName=debug Nodes=127.0.0.[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=127.0.0.[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""


def why_not() -> str | None:
    """Return why there can be no SLURM here; None when there can."""
    missing = [
        name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=search_path()) is None
    ]
    if missing:
        return f"{', '.join(missing)} not found: {INSTALL}"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    return None


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class SlurmCluster:
    """Two nodes with four cores each, partition `high` preempts partition `debug`."""

    def __init__(self, root: Path):
        self.root = root
        self.conf = root / "slurm.conf"
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        # Below the ports that jobs take for their ranks, 15000 and up.
        port = 14000 + secrets.randbelow(300) * 3
        conf = CONF.format(
            root=self.root, host=socket.gethostname().partition(".")[0], port=port, port1=port + 1, port2=port + 2,
            first_job=secrets.randbelow(8000) + 1,
        )  # fmt: skip
        (self.root / "state").mkdir(parents=True)
        self.conf.write_text(conf)
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", *(f"--{option}={self.root}/munge.{file}" for option, file in files.items()))
        self.run("slurmctld", "-c", "-f", str(self.conf))
        for node in NODES:
            self.run("slurmd", "-f", str(self.conf), "-N", node)
        wait_for("two idle nodes", 30, lambda: set(self.ask("sinfo", "-h", "-o", "%T").split()) == {"idle"})

    def stop(self) -> None:
        self.ask("scancel", "--user=root")
        deadline = time.monotonic() + 40
        while self.ask("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES), "munge"):
            end_daemon(self.root / f"{name}.pid")

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def ask(self, *command: str) -> str:
        """Return a client's output, empty while the controller does not answer: then client calls block for seconds."""
        try:
            return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=5).stdout
        except subprocess.TimeoutExpired:
            return ""


def end_daemon(pid_file: Path) -> None:
    """End the daemon that wrote the file; a stale pid is left alone."""
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    name = Path(f"/proc/{pid}/comm")
    if not name.exists() or not name.read_text().startswith(("slurm", "munged")):
        return
    os.kill(pid, signal.SIGTERM)
    wait_for(f"the end of {pid_file.stem}", 20, lambda: not name.exists())


def wait_for(what: str, seconds: float, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)
