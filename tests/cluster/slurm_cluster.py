"""A real SLURM for tests: munged, slurmctld and two slurmd on this machine, loopback only, started and stopped here.

Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm slurm-client munge
With accounting also slurmdbd and MariaDB: apt-get install -y --no-install-recommends slurmdbd mariadb-server-core
mariadb-client-core
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends slurm-wlm slurm-client munge"
INSTALL_ACCOUNTING = "apt-get install -y --no-install-recommends slurmdbd mariadb-server-core mariadb-client-core"
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
TaskPlugin={tasks}
SelectType=select/cons_tres
SelectTypeParameters={resources}
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
ReturnToService=2
MinJobAge={min_job_age}
FirstJobId={first_job}
MailProg=/bin/true
{accounting}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=4000
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=4000
PartitionName=debug Nodes=127.0.0.[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=INFINITE
PartitionName=high Nodes=127.0.0.[1-2] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""

NO_ACCOUNTING = "AccountingStorageType=accounting_storage/none"
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={root}/munge.socket
JobAcctGatherType=jobacct_gather/linux
DefMemPerNode=900"""
MEMORY_CGROUPS = Path("/sys/fs/cgroup/memory")
CGROUP_CONF = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=yes
"""
DATABASE_CONF = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
LogFile={root}/slurmdbd.log
PidFile={root}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
"""


def why_not(has_accounting: bool = False) -> str | None:
    """Return why there can be no SLURM here; None when there can."""
    for names, install in (
        (("munged", "slurmctld", "slurmd", "sbatch"), INSTALL),
        (("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb") if has_accounting else (), INSTALL_ACCOUNTING),
    ):
        if missing := [name for name in names if shutil.which(name, path=search_path()) is None]:
            return f"{', '.join(missing)} not found: {install}"
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root"
    return None


def search_path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"


class SlurmCluster:
    """Two nodes with four cores each, partition `high` preempts partition `debug`.

    With accounting, slurmctld forgets jobs some seconds after they end.
    """

    def __init__(self, root: Path, has_accounting: bool = False):
        self.root = root
        self.has_accounting = has_accounting
        self.conf = root / "slurm.conf"
        self.environment = {**os.environ, "PATH": search_path(), "SLURM_CONF": str(self.conf)}
        self.database: subprocess.Popen[bytes] | None = None

    @property
    def limits_memory(self) -> bool:
        """Return whether jobs that take more memory than they asked for are killed: Linux does it."""
        return self.has_accounting and os.access(MEMORY_CGROUPS, os.W_OK)

    def start(self) -> None:
        # Below the ports that jobs take for their ranks, 15000 and up.
        port = 13000 + secrets.randbelow(380) * 5
        accounting = ACCOUNTING.format(root=self.root, port=port + 3) if self.has_accounting else NO_ACCOUNTING
        conf = CONF.format(
            root=self.root, host=socket.gethostname().partition(".")[0], port=port, port1=port + 1, port2=port + 2,
            first_job=secrets.randbelow(8000) + 1, accounting=accounting,
            min_job_age=2 if self.has_accounting else 3600,
            resources="CR_Core_Memory" if self.has_accounting else "CR_Core",
            tasks="task/cgroup" if self.limits_memory else "task/none",
        )  # fmt: skip
        (self.root / "state").mkdir(parents=True)
        if self.limits_memory:
            (self.root / "cgroup.conf").write_text(CGROUP_CONF)
        self.conf.write_text(conf)
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run("munged", *(f"--{option}={self.root}/munge.{file}" for option, file in files.items()))
        if self.has_accounting:
            self.start_accounting(port + 3, port + 4)
        self.start_slurmctld()
        for node in NODES:
            self.run("slurmd", "-f", str(self.conf), "-N", node)
        wait_for("two idle nodes", 30, lambda: set(self.ask("sinfo", "-h", "-o", "%T").split()) == {"idle"})

    def start_slurmctld(self) -> None:
        """Start the controller without a memory of earlier jobs."""
        self.run("slurmctld", "-c", "-f", str(self.conf))

    def start_accounting(self, port: int, database_port: int) -> None:
        """Start MariaDB, and slurmdbd before it."""
        data, place = self.root / "database", self.root / "database.d"
        for folder in (data, place):
            folder.mkdir()
        common = ["--no-defaults", "--user=root", f"--datadir={data}"]
        self.run("mariadb-install-db", *common, "--skip-test-db", "--auth-root-authentication-method=normal")
        with (self.root / "mariadb.log").open("wb") as log:
            self.database = subprocess.Popen(
                ["mariadbd", *common, f"--socket={place}/socket", f"--pid-file={place}/pid",
                 "--bind-address=127.0.0.1", f"--port={database_port}", "--innodb-buffer-pool-size=64M",
                 "--innodb-lock-wait-timeout=900"],
                env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        sql = ["mariadb", "--no-defaults", f"--socket={place}/socket", "--user=root", "--execute"]
        wait_for("the database", 60, lambda: self.ask(*sql, "select 1"))
        users = [f"slurm@'{host}'" for host in ("127.0.0.1", "localhost")]
        self.run(*sql, "create database slurm_acct_db")
        for user in users:
            self.run(*sql, f"create user {user} identified by 'slurm'; grant all on slurm_acct_db.* to {user}")
        path = self.root / "slurmdbd.conf"
        path.write_text(DATABASE_CONF.format(root=self.root, port=port, database_port=database_port))
        path.chmod(0o600)
        self.start_slurmdbd()

    def start_slurmdbd(self) -> None:
        self.run("slurmdbd")
        (port,) = re.findall(r"DbdPort=(\d+)", (self.root / "slurmdbd.conf").read_text())
        wait_for("slurmdbd", 30, lambda: is_open(int(port)))

    def stop(self) -> None:
        self.ask("scancel", "--user=root")
        deadline = time.monotonic() + 40
        while self.ask("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.2)
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES), "slurmdbd", "munge"):
            end_daemon(self.root / f"{name}.pid")
        if self.database is not None:
            self.database.terminate()
            self.database.wait(60)

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


def is_open(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


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
