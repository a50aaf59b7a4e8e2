"""The Slurm templates on a real Slurm of two virtual nodes: launch, requeue, dependencies, the pipeline end to end."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cluster import NODES, SlurmCluster

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("index", "index-test", "embed", "cluster", "assign", "train", "export", "evaluate")
REQUEUE_STATUS = 85
# The job script's defaults are 10 nodes x 8 GPUs; these options of sbatch override them.
TWO_CPU_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=00:20:00")
SHORT_TRAINING = ("optimizer.warmup_steps=2", "train.log_every=1")
JOB_DEADLINE_S = 120.0
PIPELINE_DEADLINE_S = 720.0

ALL_REDUCE = """
import datetime, os, torch, torch.distributed as dist
rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60))
total = torch.tensor([10.0 ** rank])
dist.all_reduce(total)
print("node", os.environ["SLURMD_NODENAME"], "local", os.environ["SLURM_LOCALID"], "total", total.item(), flush=True)
dist.destroy_process_group()
"""


def cpu_site(folder: Path, python_folder: Path | None = None) -> dict[str, str]:
    """Environment of a submission: the CPU site, everything written below `folder`, `python` from `python_folder`."""
    path = os.pathsep.join([str(python_folder or Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "MLCD_SITE": str(ROOT / "slurm/site_local_cpu.sh"), "MLCD_WORK": str(folder)}


def stub_python(folder: Path, script: str) -> Path:
    """A folder with a `python` that notes how it was called, a line per rank and start, and runs `script`."""
    programs = folder / "bin"
    programs.mkdir()
    note = (
        'printf "%s restart=%s rank=%s ntasks=%s master=%s:%s omp=%s args=%s\\n" python "${SLURM_RESTART_COUNT:-0}" '
        '"$SLURM_PROCID" "$SLURM_NTASKS" "$MASTER_ADDR" "$MASTER_PORT" "$OMP_NUM_THREADS" "$*" '
    )
    python = programs / "python"
    python.write_text(f"#!/bin/bash\n{note}>> {shlex.quote(str(folder / 'calls'))}\n{script}\n")
    python.chmod(0o755)
    return programs


def calls(folder: Path) -> list[str]:
    """What the stub noted so far, sorted."""
    file = folder / "calls"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def submit_training(slurm: SlurmCluster, folder: Path, script: str, *options: str, **site: str) -> int:
    """Submit train_vit_l.sh with a stub instead of python; more options of sbatch, and settings of the site."""
    env = {**cpu_site(folder, stub_python(folder, script)), **site}
    options = (*TWO_CPU_RANKS, f"--output={folder}/%j.out", *options)
    return slurm.submit(*options, "slurm/train_vit_l.sh", "a.b=c d", env=env, cwd=ROOT)


def test_srun_reaches_both_nodes(slurm: SlurmCluster) -> None:
    command = ("srun", "-N2", "--ntasks-per-node=1", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(slurm.run(*command).stdout.split()) == sorted(NODES)


def test_daemons_listen_on_loopback_only(slurm: SlurmCluster) -> None:
    """Sockets in state LISTEN (0A) that belong to our daemons have the local address 127.0.0.1 (little endian)."""
    inodes = set()
    for _, daemon in slurm.daemons:
        for descriptor in Path(f"/proc/{daemon.pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[len("socket:[") : -1])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes]
    assert listening == ["0100007F"] * 3  # slurmctld and two slurmd


def test_all_reduce_across_nodes(slurm: SlurmCluster, tmp_path: Path) -> None:
    (tmp_path / "all_reduce.py").write_text(ALL_REDUCE)
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\nset -euo pipefail\nexport MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1\n"
        "export MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))\n"
        f"srun {shlex.quote(sys.executable)} all_reduce.py\n"
    )
    job_id = slurm.submit("--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/%j.out", "job.sh", cwd=tmp_path)
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert job.state == "COMPLETED", job.log()
    lines = sorted(line for line in job.log().splitlines() if line.startswith("node "))
    assert lines == [f"node {node} local 0 total 11.0" for node in NODES]


def test_training_command_and_rendezvous(slurm: SlurmCluster, tmp_path: Path) -> None:
    """One task per rank, the settings' command line, the caller's overrides unsplit and last."""
    job_id = submit_training(slurm, tmp_path, "exit 0")
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert job.state == "COMPLETED", job.log()
    arguments = (
        "-m mlcd_ds train --deepspeed_config ds_configs/zero1_fp32_cpu.json --recipe demo "
        f"train.out={tmp_path}/run data.index={tmp_path}/index/train data.labels={tmp_path}/labels "
        f"data.clusters={tmp_path}/clusters a.b=c d"
    )
    port = 15000 + job_id % 15000
    assert calls(tmp_path) == [
        f"python restart=0 rank={rank} ntasks=2 master=127.0.0.1:{port} omp=1 args={arguments}" for rank in (0, 1)
    ]


def test_master_is_first_host_of_allocation(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Without MLCD_MASTER_ADDR; site.sh itself, since the CPU site sets one."""
    job_id = submit_training(slurm, tmp_path, "exit 0", MLCD_SITE="slurm/site.sh")
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert job.state == "COMPLETED", job.log()
    assert all(f"master={NODES[0]}:" in line for line in calls(tmp_path)), calls(tmp_path)


def test_status_85_requeues_and_dependents_wait(slurm: SlurmCluster, tmp_path: Path) -> None:
    """The first start asks for a requeue, the second is done; a job behind it runs only then."""
    script = f"(( ${{SLURM_RESTART_COUNT:-0}} > 0 )) || exit {REQUEUE_STATUS}; echo second > {tmp_path}/state"
    job_id = submit_training(slurm, tmp_path, script)
    behind = slurm.submit(
        *(f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes", f"--output={tmp_path}/behind.out"),
        f"--wrap=cat {tmp_path}/state",
    )
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.log()
    assert [line.split()[1:3] for line in calls(tmp_path)] == [
        [f"restart={restart}", f"rank={rank}"] for restart in (0, 1) for rank in (0, 1)
    ]
    assert "requeue 1 of at most 50" in job.log()
    follower = slurm.wait_finished(behind, JOB_DEADLINE_S)
    assert (follower.state, follower.log()) == ("COMPLETED", "second\n")


def test_number_of_requeues_is_limited(slurm: SlurmCluster, tmp_path: Path) -> None:
    job_id = submit_training(slurm, tmp_path, f"exit {REQUEUE_STATUS}", MLCD_MAX_REQUEUES="1")
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert (job.state, job.restarts, job.exit_status) == ("FAILED", 1, REQUEUE_STATUS), job.log()
    assert "MLCD_MAX_REQUEUES=1" in job.log()


def test_failure_is_not_requeued(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Status 1 of a single rank fails the job, and jobs behind it leave the queue."""
    job_id = submit_training(slurm, tmp_path, "exit $SLURM_PROCID")
    behind = slurm.submit(f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes", "--wrap=true", cwd=tmp_path)
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert (job.state, job.restarts, job.exit_status) == ("FAILED", 0, 1), job.log()
    assert "FAILED with status 1" in job.log()
    assert len(calls(tmp_path)) == 2
    assert slurm.wait_finished(behind, JOB_DEADLINE_S).state == "CANCELLED"


# Saves when told to, each rank at its own time: the first to leave must not have the other killed.
SAVES_ON_SIGNAL = r"""
save() {{ [[ $SLURM_PROCID == 0 ]] || until [[ -e {folder}/saved.0 ]]; do sleep 0.1; done
          [[ $SLURM_PROCID == 0 ]] || sleep 2
          touch {folder}/saved.$SLURM_PROCID; exit 85; }}
trap "trap 'touch {folder}/interrupted.\$SLURM_PROCID' TERM; save" USR1
trap save TERM
(( ${{SLURM_RESTART_COUNT:-0}} == 0 )) || exit 0
touch {folder}/ready.$SLURM_PROCID
while true; do sleep 0.1; done
"""


def started(slurm: SlurmCluster, folder: Path, *options: str) -> int:
    """Submit a training of two ranks that run until a signal, and wait until both listen for it."""
    job_id = submit_training(slurm, folder, SAVES_ON_SIGNAL.format(folder=shlex.quote(str(folder))), *options)
    slurm.wait_for(
        job_id, lambda _: all((folder / f"ready.{rank}").exists() for rank in (0, 1)), JOB_DEADLINE_S, "two ranks"
    )
    return job_id


def saved(folder: Path) -> list[str]:
    """Which ranks saved."""
    return sorted(file.name for file in folder.glob("saved.*"))


def test_time_limit_signals_every_rank_and_requeues(slurm: SlurmCluster, tmp_path: Path) -> None:
    """Slurm itself sends USR1, 60 to 90 s before the limit; no rank is killed while it saves."""
    job_id = started(slurm, tmp_path, "--time=00:02:00", "--signal=USR1@60")
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.log()
    assert saved(tmp_path) == ["saved.0", "saved.1"]
    assert not list(tmp_path.glob("interrupted.*"))


def test_scontrol_requeue_lets_ranks_save(slurm: SlurmCluster, tmp_path: Path) -> None:
    """An administrator's requeue, and preemption, send TERM: both ranks save, and the job starts once more only."""
    job_id = started(slurm, tmp_path)
    slurm.run("scontrol", "requeue", str(job_id))
    job = slurm.wait_finished(job_id, JOB_DEADLINE_S)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.log()
    assert saved(tmp_path) == ["saved.0", "saved.1"]


def test_cancelled_job_stays_cancelled(slurm: SlurmCluster, tmp_path: Path) -> None:
    """scancel sends TERM too, upon which the program asks for a requeue: the job script must not grant it."""
    job_id = started(slurm, tmp_path)
    slurm.run("scancel", str(job_id))
    slurm.wait_for(job_id, lambda job: job.is_finished and len(saved(tmp_path)) == 2, JOB_DEADLINE_S, "CANCELLED")
    message = "Slurm is already ending the job"
    job = slurm.wait_for(job_id, lambda job: message in job.log(), JOB_DEADLINE_S, "the script's message")
    assert (job.state, job.restarts) == ("CANCELLED", 0), job.log()


def dry_run(*arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """`bash slurm/pipeline.sh --dry-run` without any Slurm."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLCD_", "SLURM_"))}
    command = ["bash", "slurm/pipeline.sh", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**kept, **env}, capture_output=True, text=True, check=check)


def test_dry_run_prints_the_chain() -> None:
    lines = [shlex.split(line) for line in dry_run("--", "train.steps=20").stdout.splitlines()]
    waits_for = {}
    for words in lines:
        assert words[0] == "sbatch"
        options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        name = options["--job-name"].removeprefix("mlcd-")
        waits_for[name] = options.get("--dependency", "")
        assert ("--kill-on-invalid-dep" in options) == bool(waits_for[name])
        ranks = (options["--nodes"], options["--ntasks-per-node"], options["--gpus-per-node"])
        assert ranks == (("1", "1", "1") if name in ("export", "evaluate") else ("10", "8", "8"))
        assert ("--signal" in options) == (name in ("train", "cluster"))
    assert tuple(waits_for) == STAGES
    assert waits_for == {
        "index": "",
        "index-test": "",
        "embed": "afterok:<index>",
        "cluster": "afterok:<embed>",
        "assign": "afterok:<cluster>",
        "train": "afterok:<assign>",
        "export": "afterok:<train>",
        "evaluate": "afterok:<export>:<index-test>",
    }
    assert lines[5][-2:] == ["slurm/train_vit_l.sh", "train.steps=20"]


def test_dry_run_of_some_stages() -> None:
    out = dry_run("--stages", "export train", MLCD_PARTITION="gpu", MLCD_SBATCH_EXTRA="--qos=high --exclusive").stdout
    train, export = out.splitlines()
    assert "--dependency" not in train and "--partition=gpu --qos=high --exclusive" in train
    assert "--dependency=afterok:<train>" in export


def test_unknown_stage_is_named() -> None:
    done = dry_run("--stages", "train exprot", check=False)
    assert done.returncode == 2 and "unknown stage exprot" in done.stderr and not done.stdout


@dataclass(frozen=True)
class Pipeline:
    """A submitted pipeline: where it writes, the environment of its submission, the id of each stage's job."""

    folder: Path
    env: dict[str, str]
    job_ids: dict[str, int]


@pytest.fixture(scope="module")
def pipeline(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The demo, all stages, 20 training steps, submitted by pipeline.sh; tests wait for the stages that they need."""
    folder = tmp_path_factory.mktemp("pipeline")
    env = {**cpu_site(folder), "MLCD_ENCODER": "efficientnet-lite0@128"}  # at its own 224 pixels: 4 minutes for embed
    done = slurm.run("bash", "slurm/pipeline.sh", "--", *SHORT_TRAINING, "train.steps=20", env=env, cwd=ROOT)
    rows = [line.split() for line in done.stdout.splitlines()]
    ids = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}
    assert tuple(ids) == STAGES, done.stdout
    return Pipeline(folder, env, ids)


@pytest.fixture
def training_data(slurm: SlurmCluster, pipeline: Pipeline) -> Pipeline:
    """The pipeline with its index and labels finished."""
    slurm.wait_all_completed([pipeline.job_ids["assign"]], PIPELINE_DEADLINE_S)
    return pipeline


def submit_real_training(slurm: SlurmCluster, data: Pipeline, folder: Path, num_steps: int) -> int:
    """train_vit_l.sh with the real program, two ranks, the demo recipe; the run's folder is `folder`/run."""
    options = (*TWO_CPU_RANKS, f"--output={folder}/%j.out")
    overrides = (*SHORT_TRAINING, f"train.steps={num_steps}")
    env = {**data.env, "MLCD_RUN": str(folder / "run")}
    return slurm.submit(*options, "slurm/train_vit_l.sh", *overrides, env=env, cwd=ROOT)


def logged_steps(run: Path) -> list[tuple[int, float]]:
    """The steps that a run's log has so far, with their loss."""
    file = run / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [(entry["step"], entry["loss/total"]) for entry in map(json.loads, lines)]


def finished(run: Path, num_steps: int) -> bool:
    """Whether the run's last checkpoint is whole: its checkpoint.json is written last."""
    return (run / f"checkpoints/step_{num_steps:08d}/checkpoint.json").exists()


@pytest.mark.pipeline
def test_train_vit_l_alone(slurm: SlurmCluster, training_data: Pipeline, tmp_path: Path) -> None:
    """The training script by itself; and again: a finished run ends at once."""
    for _ in range(2):
        job = slurm.wait_finished(submit_real_training(slurm, training_data, tmp_path, 4), PIPELINE_DEADLINE_S)
        assert (job.state, job.restarts) == ("COMPLETED", 0), job.log()
        assert finished(tmp_path / "run", 4)
        assert [step for step, _ in logged_steps(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.pipeline
def test_training_survives_preemption(slurm: SlurmCluster, training_data: Pipeline, tmp_path: Path) -> None:
    """USR1 in mid-run: the program saves and leaves with 85, the job requeues, goes on at the next step, completes."""
    run, num_steps = tmp_path / "run", 60
    job_id = submit_real_training(slurm, training_data, tmp_path, num_steps)
    slurm.wait_for(job_id, lambda job: job.is_finished or bool(logged_steps(run)), PIPELINE_DEADLINE_S, "a step")
    slurm.run("scancel", "--signal=USR1", str(job_id))
    job = slurm.wait_for(job_id, lambda job: job.is_finished or job.restarts > 0, JOB_DEADLINE_S, "the requeue")
    before = logged_steps(run)
    assert 0 < len(before) < num_steps, f"no requeue in mid-run: {job}\n{job.log()}"
    job = slurm.wait_finished(job_id, PIPELINE_DEADLINE_S)
    assert (job.state, job.restarts) == ("COMPLETED", 1), job.log()
    after = logged_steps(run)
    assert after[: len(before)] == before, "the second start did not continue the first"
    assert [step for step, _ in after] == list(range(1, num_steps + 1))
    assert finished(run, num_steps)


@pytest.mark.pipeline
def test_pipeline_end_to_end(slurm: SlurmCluster, pipeline: Pipeline) -> None:
    jobs = slurm.wait_all_completed(pipeline.job_ids.values(), PIPELINE_DEADLINE_S)
    assert {job.restarts for job in jobs} == {0}
    for folder in ("index/train", "index/test", "embeddings", "clusters", "labels", "export", "evaluation"):
        assert json.loads((pipeline.folder / folder / "manifest.json").read_text())["stage"], folder
    assert finished(pipeline.folder / "run", 20)
    results = [file for file in (pipeline.folder / "evaluation").glob("*.json") if file.name != "manifest.json"]
    assert results, "no evaluation JSON beside its manifest"
    assert all(json.loads(file.read_text()) for file in results)
