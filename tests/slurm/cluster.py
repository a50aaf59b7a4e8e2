"""A real Slurm of two virtual nodes on this machine: munged, slurmctld and two slurmd in a folder of their own.

Nothing outside that folder is read or written, every port is on the loopback address, and what was started is ended
by its process id. There is no accounting database: a job's end is read with `scontrol show job`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue")
NODES = ("node1", "node2")
FINISHED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"})
POLL_S = 0.2
START_DEADLINE_S = 60.0
PR_SET_PDEATHSIG = 1


def missing_requirement() -> str | None:
    """Why no Slurm can be brought up here, with the remedy; None when it can."""
    absent = [name for name in (*DAEMONS, *CLIENTS) if find_program(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: `apt-get install slurm-wlm munge` brings a real Slurm for this test"
    if os.geteuid() != 0:
        return "slurmd starts jobs only as root: run these tests as root (in a container, for example)"
    return None


def find_program(name: str) -> str | None:
    """Path of a program; daemons live in sbin, which is not on everyone's PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin")


def poll(condition: Callable[[], bool], deadline_s: float, what: Callable[[], str]) -> None:
    """Ask until `condition` holds; raise TimeoutError with `what()` when the deadline has passed."""
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {deadline_s:.0f} s: {what()}")
        time.sleep(POLL_S)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass(frozen=True)
class Job:
    """A job as the controller has it. `exit_status` is that of the batch script."""

    job_id: int
    name: str
    state: str
    reason: str
    exit_status: int
    restarts: int
    output: Path

    @property
    def is_finished(self) -> bool:
        return self.state in FINISHED

    def log(self) -> str:
        """The last part of the job's output, for messages."""
        return self.output.read_text(errors="replace")[-6000:] if self.output.is_file() else "(no output)"


class SlurmCluster:
    """Context manager around the daemons; the methods run Slurm's own commands against them."""

    def __init__(self) -> None:
        self.folder = Path()
        self.daemons: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> SlurmCluster:
        # Short, since a socket's path has 107 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="mlcd-slurm-"))
        try:
            self.start()
        except BaseException as error:
            logs = self.daemon_logs()
            self.__exit__()
            raise RuntimeError(f"Slurm did not come up: {error}\n{logs}") from error
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.end_jobs()
        finally:
            for _, daemon in reversed(self.daemons):
                end_process(daemon)
            self.end_stragglers()
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start the daemons, each when the one before answers."""
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {name: self.folder / f"munge.{name}" for name in ("socket", "pid", "seed", "log")}
        self.daemon(
            "munged",
            *("--foreground", "--force", "--num-threads=2", f"--key-file={key}", f"--socket={files['socket']}"),
            *(f"--pid-file={files['pid']}", f"--seed-file={files['seed']}", f"--log-file={files['log']}"),
        )
        self.await_daemons(files["socket"].is_socket, "munged's socket")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(slurm_conf(self.folder, files["socket"]))
        self.daemon("slurmctld", "-D")
        self.await_daemons(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "slurmctld's answer")
        for node in NODES:
            self.daemon("slurmd", "-D", "-N", node)
        self.await_daemons(lambda: self.node_states() == ["idle"] * len(NODES), "two idle nodes")

    def daemon(self, program: str, *arguments: str) -> None:
        """Start a daemon in the foreground, so that its process id is known; it dies with this process."""
        path = find_program(program)
        assert path is not None, program
        name = "-".join([program, *(argument for argument in arguments if argument in NODES)])
        with open(self.folder / f"{name}.out", "wb") as output:
            daemon = subprocess.Popen(
                [path, *arguments],
                env=self.environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        self.daemons.append((name, daemon))

    def await_daemons(self, is_ready: Callable[[], bool], what: str) -> None:
        """Wait for `is_ready`, unless a daemon ends meanwhile."""

        def check() -> bool:
            ended = [
                f"{name} (status {daemon.returncode})" for name, daemon in self.daemons if daemon.poll() is not None
            ]
            if ended:
                raise RuntimeError(f"ended while starting: {', '.join(ended)}")
            return is_ready()

        poll(check, START_DEADLINE_S, lambda: what)

    def daemon_logs(self) -> str:
        """The last lines of what each daemon said."""
        files = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def end_jobs(self) -> None:
        """Cancel what is in the queue and wait until the nodes are empty."""
        if not self.daemons or self.daemons[-1][0] != f"slurmd-{NODES[-1]}":
            return
        self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self.run("scancel", "--user=root", check=False)
        try:
            poll(lambda: not self.run("squeue", "-h", check=False).stdout.strip(), 60.0, lambda: "an empty queue")
        except TimeoutError:
            pass  # end_stragglers sees to the rest

    def end_stragglers(self) -> None:
        """Kill processes of jobs that outlived their slurmd: those whose environment names our slurm.conf."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue  # it has ended

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment, without settings of another Slurm or of this project, plus `extra`."""
        foreign = re.compile(r"(SLURM|SBATCH|SRUN|MLCD|MASTER)_|(RANK|WORLD_SIZE|LOCAL_RANK)$")
        kept = {key: value for key, value in os.environ.items() if not foreign.match(key)}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), **(extra or {})}

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster; `env` adds to its environment."""
        done = subprocess.run(
            command,
            env=self.environment(env),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> int:
        """`sbatch ARGUMENTS`; returns the job's id."""
        return int(self.run("sbatch", "--parsable", *arguments, env=env, cwd=cwd).stdout.strip())

    def node_states(self) -> list[str]:
        """State of every node, as sinfo says it."""
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split()

    def job(self, job_id: int) -> Job:
        """Ask the controller about a job."""
        text = self.run("scontrol", "show", "job", "--oneliner", str(job_id)).stdout

        def field(name: str) -> str:
            found = re.search(rf"(?:^|\s){name}=(\S*)", text)
            assert found, f"{name} in {text}"
            return found[1]

        return Job(
            job_id=job_id,
            name=field("JobName"),
            state=field("JobState"),
            reason=field("Reason"),
            exit_status=int(field("ExitCode").split(":")[0]),
            restarts=int(field("Restarts")),
            output=Path(field("StdOut")),
        )

    def wait_for(self, job_id: int, condition: Callable[[Job], bool], deadline_s: float, what: str) -> Job:
        """Wait until `condition` holds for the job; the TimeoutError shows its log."""
        last = self.job(job_id)

        def check() -> bool:
            nonlocal last
            last = self.job(job_id)
            return condition(last)

        poll(check, deadline_s, lambda: f"{what}; now {last}\n{last.log()}")
        return last

    def wait_finished(self, job_id: int, deadline_s: float) -> Job:
        """Wait for a job's end, whichever it is."""
        return self.wait_for(job_id, lambda job: job.is_finished, deadline_s, "the end of the job")

    def wait_all_completed(self, job_ids: Iterable[int], deadline_s: float) -> list[Job]:
        """Wait until every job is COMPLETED; raise with the log of the first that ends otherwise."""
        end = time.monotonic() + deadline_s
        jobs = []
        for job_id in job_ids:
            job = self.wait_finished(job_id, max(0.0, end - time.monotonic()))
            if job.state != "COMPLETED":
                raise RuntimeError(f"{job}\n{job.log()}")
            jobs.append(job)
        return jobs


def die_with_parent() -> None:
    """In a new child: be sent TERM when the test process is gone, however it went."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_process(process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """TERM, and KILL when that does not help."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def slurm_conf(folder: Path, munge_socket: Path) -> str:
    """The cluster: two nodes of one CPU each, so that a two-node job fills it and the next one queues."""
    host = socket.gethostname().split(".")[0]
    controller_port, *node_ports = free_ports(1 + len(NODES))
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // len(NODES)
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory={memory_mib}"
        for node, port in zip(NODES, node_ports, strict=True)
    )
    # cred_expire: a requeued job may start after so many seconds (120 by default).
    # NoInAddrAny, NoCtldInAddrAny: listen on the address that belongs to the name, not on all.
    # config_overrides: believe the lines below about CPUs, not the hardware.
    return f"""\
ClusterName=mlcd-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={munge_socket},cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
SlurmdTimeout=600
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2
MinJobAge=86400
KillWait=30
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
