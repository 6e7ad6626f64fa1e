"""Start a real Slurm cluster of one node on the loopback interface, for tests."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Return the programs of Slurm and munge that are not installed."""
    return [program for program in PROGRAMS if _program(program) is None]


@contextlib.contextmanager
def slurm_node(folder: Path) -> Iterator[dict[str, str]]:
    """Start munge, the controller and a node; yield the environment variables with which commands reach the cluster."""
    host = socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=host, folder=folder, ports=_free_ports(2)))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    os.chmod(folder, 0o755)
    environment = {**os.environ, "SLURM_CONF": str(config)}
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "log-file")]
    munge += [f"--seed-file={folder}/munge.seed", "--force", "--group-update-time=-1"]
    try:
        for program, *flags in (["munged", *munge], ["slurmctld"], ["slurmd"]):
            subprocess.run([_program(program), *flags], env=environment, check=True, timeout=60)
        _wait_for_node(environment)
        yield {"SLURM_CONF": str(config)}
    finally:
        subprocess.run([shutil.which("scancel"), "--user=root"], env=environment, timeout=60)
        for name in ("slurmd", "slurmctld", "munge"):
            _stop(folder / f"{name}.pid")


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for unbound in sockets:
        unbound.bind(("127.0.0.1", 0))
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


def _wait_for_node(environment: dict[str, str]) -> None:
    for _ in range(120):
        result = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
        if result.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    raise TimeoutError(f"The node did not become idle within a minute: {result.stdout} {result.stderr}")


def _stop(path: Path) -> None:
    """End the process whose id is in a pid file."""
    if not path.is_file():
        return
    process = int(path.read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)
        for _ in range(100):
            time.sleep(0.1)
            os.kill(process, 0)
        os.kill(process, signal.SIGKILL)
