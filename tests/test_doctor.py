"""`megaprior doctor` finds faults that are really there: locks, ports, limits, names, folders, ranks that differ."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megaprior.distributed import Place
from megaprior.doctor import device, folders, launcher, machine, network, planned, ranks, software
from megaprior.doctor.finding import Finding, green, red, together, worst
from megaprior.doctor.probe import Probe, Silent

ROOT = Path(__file__).resolve().parents[1]
ALONE = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def doctor(*arguments: object, environment: dict[str, str] | None = None, **how: Any) -> tuple[int, dict[str, Any]]:
    """(exit code, report) of a real `megaprior doctor --json`."""
    env = {k: v for k, v in {**os.environ, **ALONE, **(environment or {})}.items() if v is not None}
    command = [sys.executable, "-m", "megaprior.cli", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, **how)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def levels(report: dict[str, Any]) -> dict[str, str]:
    """The worst level of each check."""
    found: dict[str, str] = {}
    for finding in report["findings"]:  # the worst stand last
        found[finding["check"]] = finding["level"]
    return found


def of(report: dict[str, Any], check: str) -> dict[str, str]:
    return next(f for f in reversed(report["findings"]) if f["check"] == check)


@pytest.fixture
def listener() -> Iterator[str]:
    """A port on which this process listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield str(held.getsockname()[1])


# ---------------------------------------------------------------- whole visits


def test_a_sound_machine_is_not_red(tmp_path: Path) -> None:
    start = time.perf_counter()
    code, report = doctor("--shared", tmp_path, environment={"TORCH_EXTENSIONS_DIR": str(tmp_path / "ext")})
    assert time.perf_counter() - start < 60  # a guard against hangs; docs/notebook.md has the measured time
    assert code == 0, report
    assert report["verdict"] in ("green", "yellow")
    assert {"launcher", "torch", "deepspeed", "GPUs", "loss kernel", "gloo", "names", "port"} <= set(levels(report))
    assert levels(report)["gloo"] != "red"
    assert "fsync, rename and locks work" in of(report, f"folder {tmp_path}")["found"]
    assert [path.name for path in tmp_path.iterdir()] == []  # nothing is left behind, nor made


def test_everything_that_is_wrong_is_found_in_one_visit(tmp_path: Path, listener: str) -> None:
    for name in ("bin1", "bin2", "home", "sealed", "ext/cpu_adam"):
        (tmp_path / name).mkdir(parents=True)
    for folder in ("bin1", "bin2"):
        ninja = tmp_path / folder / "ninja"
        ninja.write_text("#!/bin/sh\n")
        ninja.chmod(0o755)
    lock = tmp_path / "ext/cpu_adam/lock"
    lock.touch()
    os.utime(lock, (time.time() - 7200,) * 2)
    for name in ("home", "sealed"):
        (tmp_path / name).chmod(0o555)
    library = ctypes.CDLL(None, use_errno=True)

    def weaken() -> None:
        if os.geteuid() == 0:  # root may write anywhere unless it gives that up
            for capability in (1, 2):
                assert library.prctl(24, capability, 0, 0, 0) == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    environment = {
        "PATH": os.pathsep.join([str(tmp_path / "bin1"), str(tmp_path / "bin2"), os.environ["PATH"]]),
        "HOME": str(tmp_path / "home"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"),
        "MASTER_PORT": listener,
        "MASTER_ADDR": "no-such-host.invalid",
        "OMP_NUM_THREADS": "4096",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "GLOO_SOCKET_IFNAME": "eth99",
        "MEGAPRIOR_LOSS_IMPL": "fastest",
    }
    code, report = doctor(
        "--shared", tmp_path / "sealed", tmp_path / "absent", environment=environment, preexec_fn=weaken
    )
    assert code == 1
    assert report["verdict"] == "red"
    found = levels(report)
    reds = {"launcher", "loss kernel", "compiled operators", "file size", "names", "interfaces", "port", "gloo"}
    assert {name for name in reds if found[name] != "red"} == set()
    assert found[f"folder {tmp_path / 'sealed'}"] == found[f"folder {tmp_path / 'absent'}"] == "red"
    assert {name for name in ("ninja", "processors", "open files", "home") if found[name] != "yellow"} == set()
    assert of(report, "compiled operators")["remedy"] == f"rm {lock}"
    assert f"process {os.getpid()}" in of(report, "port")["found"]
    assert "RANK=$SLURM_PROCID" in of(report, "launcher")["remedy"]
    assert all(f["why"] and f["remedy"] for f in report["findings"] if f["level"] != "green")


# ---------------------------------------------------------------- several ranks


@pytest.mark.slow
def test_torchrun_compares_the_ranks(tmp_path: Path) -> None:
    env = {k: v for k, v in {**os.environ, **ALONE, "OMP_NUM_THREADS": "1"}.items() if v is not None}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megaprior.cli", "doctor"]
    done = subprocess.run(
        [*command, "--json", "--shared", str(tmp_path)], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["of"] == "2 ranks on 1 machine(s)"
    found = levels(report)
    assert {found[name] for name in ("launcher", "ranks", "clocks", "port", f"shared {tmp_path}")} == {"green"}
    assert "held by torchrun" in of(report, "port")["found"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ranks_that_differ_and_see_different_folders(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        (tmp_path / str(rank) / "shared").mkdir(parents=True)
        environment = {**os.environ, **TWO, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
        environment |= {"OMP_NUM_THREADS": str(rank + 1), "TRITON_INTERPRET": "1"}
        environment["MEGAPRIOR_LOSS_IMPL"] = ("torch", "triton")[rank]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "megaprior.cli", "doctor", "--json", "--shared", "shared"],
                cwd=tmp_path / str(rank),
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    (first, _), (second, _) = (process.communicate(timeout=200) for process in processes)
    assert [process.returncode for process in processes] == [1, 1]
    assert second == ""  # rank 0 speaks for all
    report = json.loads(first)
    found = levels(report)
    assert found["shared shared"] == found["ranks: loss kernel"] == "red"
    assert found["ranks: threads"] == "yellow"
    assert "ranks: torch" not in found
    assert f"{tmp_path}/1/shared: rank 0's file is not there" in of(report, "shared shared")["found"]
    assert "torch on rank 0" in of(report, "ranks: loss kernel")["found"]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_no_hang(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**TWO, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": port}
    start = time.monotonic()
    code, report = doctor("--shared", tmp_path, "--timeout", 10, environment=environment)
    assert code == 1
    assert time.monotonic() - start < 60
    assert "rank 0 of 2 cannot meet the others" in of(report, "ranks")["found"]


# ---------------------------------------------------------------- the launcher's environment


def refused(tmp_path: Path, environment: dict[str, str]) -> str:
    """The one line of a training that cannot start under this environment."""
    config = tmp_path / "run.yaml"
    config.write_text("stage: textlm\nengine: zero3\nout: run\nsteps: 3\ntimeout_s: 2\ndata: {train: [{path: none}]}\n")
    env = {k: v for k, v in {**os.environ, **ALONE, **environment}.items() if v is not None}
    command = [sys.executable, "-m", "megaprior.cli", "train", str(config)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    said = [line for line in done.stderr.splitlines() if line.startswith("megaprior: error: ")]
    assert (done.returncode, len(said)) == (2, 1), done.stderr
    return said[0]


def test_training_under_a_wrong_environment_says_so_in_one_line_and_sends_to_the_doctor(
    tmp_path: Path, listener: str
) -> None:
    for environment, words in (
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK not set while WORLD_SIZE and LOCAL_RANK"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "srun started 4 processes"),
        ({**TWO, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": listener}, "address already in use"),
    ):
        said = refused(tmp_path, environment)
        assert words in said
        assert "`megaprior doctor`, started in the same way" in said


@pytest.mark.slow
def test_a_stale_port_is_no_hang(tmp_path: Path, listener: str) -> None:
    """Something else listens there and never answers: torch alone would wait for ever."""
    said = refused(tmp_path, {**TWO, "MASTER_PORT": listener})
    assert (
        f"rank 1 of 2 cannot meet the others at 127.0.0.1:{listener} (what listens there has not answered within 2 s)"
        in said
    )


@pytest.mark.parametrize(
    ("environment", "level", "words"),
    [
        ({}, "green", "no launcher's variables"),
        (TWO, "green", "rank 1 of 2, local rank 1"),
        ({**TWO, "RANK": ""}, "red", "RANK not set while"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "red", "srun started 4 processes"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "red", "mpirun started 4 processes"),
        (
            {**TWO, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"},
            "red",
            "RANK=1 but SLURM_PROCID=0",
        ),
        (
            {**TWO, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            "red",
            "WORLD_SIZE=2 but OMPI_COMM_WORLD_SIZE=4",
        ),
        ({**TWO, "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}, "red", "MASTER_ADDR=localhost with 2 ranks"),
        ({"SLURM_JOB_NUM_NODES": "8"}, "yellow", "one process in a Slurm allocation of 8 nodes"),
    ],
)
def test_the_launchers_variables(environment: dict[str, str], level: str, words: str) -> None:
    _, findings = launcher.read(environment)
    assert [finding.level for finding in findings] == [level]
    assert words in findings[0].found


def test_one_torchrun_per_slurm_task_is_no_contradiction() -> None:
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "TORCHELASTIC_RUN_ID": "x"}
    assert worst(launcher.read({**TWO, **slurm})[1]) == "green"


# ---------------------------------------------------------------- software


def test_a_killed_build_leaves_a_lock_and_a_live_one_is_waited_for(tmp_path: Path) -> None:
    build = tmp_path / "py311_cpu" / "cpu_adam"
    build.mkdir(parents=True)
    script = (
        "import sys, time\nfrom torch.utils.file_baton import FileBaton\n"
        "assert FileBaton(sys.argv[1]).try_acquire()\nprint('held', flush=True)\ntime.sleep(600)"
    )
    builder = subprocess.Popen(
        [sys.executable, "-c", script, str(build / "lock")], cwd=build, stdout=subprocess.PIPE, text=True
    )
    assert builder.stdout is not None
    assert builder.stdout.readline() == "held\n"
    os.utime(build / "lock", (time.time() - 300,) * 2)  # a slow one
    (alive,) = software.check_extensions(tmp_path, gpu=False)
    assert alive.level == "yellow"
    assert "a build is going on there" in alive.found
    builder.kill()
    builder.wait()
    (dead,) = software.check_extensions(tmp_path, gpu=False)
    assert (dead.level, dead.remedy) == ("red", f"rm {build / 'lock'}")
    (build / "lock").unlink()
    assert worst(software.check_extensions(tmp_path, gpu=True)) == "green"


def test_a_cache_that_cannot_be_made_is_red(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = software.check_extensions(tmp_path / "file" / "ext", gpu=False)
    assert finding.level == "red"


def test_a_package_that_is_too_old_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(software.check_versions()) == "green"
    real = software.installed
    monkeypatch.setattr(
        software, "installed", lambda name: {"deepspeed": "0.19.2", "pyyaml": None}.get(name, real(name))
    )
    found = {finding.check: finding for finding in software.check_versions() if finding.level != "green"}
    assert set(found) == {"deepspeed", "pyyaml"}
    assert found["deepspeed"].found == "0.19.2, needed >=0.19.3"
    assert found["deepspeed"].remedy == "pip install 'deepspeed>=0.19.3'"
    assert found["pyyaml"].found.startswith("not installed")


# ---------------------------------------------------------------- machine


def test_too_little_shared_memory(tmp_path: Path, small_disk: Callable[..., Any]) -> None:
    with small_disk(tmp_path, "64m"):  # what docker gives by default
        (finding,) = machine.check_shm(tmp_path)
        assert finding.level == "red"
        assert "64.0 MiB" in finding.found
    assert machine.check_shm(tmp_path / "absent")[0].level == "red"


def test_more_ranks_than_processors() -> None:
    here = len(os.sched_getaffinity(0))
    assert worst(machine.check_processors({}, ranks_here=1)) == "green"
    assert worst(machine.check_processors({}, ranks_here=here + 1)) == "yellow"
    assert worst(machine.check_processors({"OMP_NUM_THREADS": "many"}, ranks_here=1)) == "yellow"


# ---------------------------------------------------------------- network


def test_a_port_in_use_is_red_where_it_was_asked_for(listener: str) -> None:
    (asked,) = network.check_port({"MASTER_PORT": listener}, None)
    assert asked.level == "red"
    assert f"process {os.getpid()}" in asked.found
    assert network.check_port({"MASTER_PORT": listener}, Place(1, 2, 1)) == []  # rank 0 listens, nobody else
    (agents,) = network.check_port({"MASTER_PORT": listener, "TORCHELASTIC_USE_AGENT_STORE": "True"}, None)
    assert agents.level == "green"
    assert network.check_port({"MASTER_PORT": "99999"}, None)[0].level == "red"


def test_names_that_mean_nothing() -> None:
    host = socket.gethostname()
    facts = network.look(host, "no-such-host.invalid")
    assert isinstance(facts["no-such-host.invalid"], str)
    (finding,) = network.check_names(
        {**facts, host: ["10.0.0.1"]}, {"MASTER_ADDR": "no-such-host.invalid"}, several=False
    )
    assert finding.level == "red"
    loopback = {host: ["127.0.1.1"]}
    assert worst(network.check_names(loopback, {}, several=False)) == "green"
    assert worst(network.check_names(loopback, {}, several=True)) == "red"
    assert worst(network.check_names(loopback, {"GLOO_SOCKET_IFNAME": "lo"}, several=True)) == "green"


# ---------------------------------------------------------------- folders


def test_a_disk_that_is_too_small_is_red(tmp_path: Path, small_disk: Callable[..., Any]) -> None:
    with small_disk(tmp_path, "2m"):
        facts = folders.look(str(tmp_path))
        assert facts["kind"] == "tmpfs"
        assert facts["lock"] is None
        found = folders.check_folder(facts)
        assert worst(found) == "red"
        assert "2.0 MiB, needed 256.0 MiB" in found[0].found
        assert list(tmp_path.iterdir()) == []
    facts = folders.look(str(tmp_path))
    needed = folders.check_folder(facts, needed=facts["free"] + 1)
    assert worst(needed) == "red"


def test_a_clock_that_differs_and_locks_that_end_at_the_machine() -> None:
    facts = {"path": "x", "error": None, "kind": "nfs4", "source": "", "options": "rw,nolock", "free": 1 << 40}
    facts |= {"total": 1 << 41, "inodes": 100, "speed": 1e6, "skew": -30.0, "lock": None}
    found = " / ".join(finding.found for finding in folders.check_folder(facts))
    for words in ("100 inodes left", "nolock", "written at 976.6 KiB/s", "by -30.0 s"):
        assert words in found


def test_what_hangs_is_given_up_and_what_crashes_is_told(tmp_path: Path) -> None:
    hanging = Probe("folder", str(tmp_path), timeout_s=1.0)
    os.kill(hanging._process.pid, signal.SIGSTOP)  # as a folder does whose server is gone
    with pytest.raises(Silent, match="no answer within 1 s"):
        hanging.answer()
    crashing = Probe("folder", str(tmp_path), timeout_s=60.0)
    os.kill(crashing._process.pid, signal.SIGSEGV)
    with pytest.raises(Silent, match="ended with exit code -11"):
        crashing.answer()


# ---------------------------------------------------------------- GPUs

SMI = """\
0, NVIDIA H100 80GB HBM3, 81559, 4, 570.86.15, 0
1, NVIDIA H100 80GB HBM3, 81559, 71040, 570.86.15, 3
2, NVIDIA H100 80GB HBM3, 81559, 4, 570.86.15, [N/A]
"""


def smi_says(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Any:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return device.smi(2.0)


def test_gpus_with_errors_in_use_or_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = smi_says(tmp_path, monkeypatch, f"cat <<'EOF'\n{SMI}EOF")
    assert [gpu["index"] for gpu in listed] == ["0", "1", "2"]
    gpu = {"name": "NVIDIA H100 80GB HBM3", "free": 80 << 30, "total": 80 << 30}
    facts: dict[str, Any] = {
        "devices": [gpu] * 3,
        "cuda": "13.0",
        "nccl": "2.28.3",
        "torch": "2.13.0",
        "blind": [(0, 1)],
    }
    found = device.check_gpus(facts, listed, 0)
    assert [finding.level for finding in found] == ["green", "red", "yellow", "yellow"]
    assert "GPU 1: 3 uncorrected memory errors" in found[1].found
    assert "GPU 1: 71,040 MiB in use" in found[2].found
    assert "LOCAL_RANK=3 but this process sees 3" in device.check_gpus(facts, listed, 3)[0].found
    (unseen,) = device.check_gpus({**facts, "devices": [], "cuda": None}, listed, 0)
    assert unseen.level == "red"


def test_an_nvidia_smi_that_hangs_or_fails_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = smi_says(tmp_path, monkeypatch, "exec sleep 60")
    assert hanging == "nvidia-smi does not answer within 2 s"
    assert device.check_gpus({"devices": []}, hanging, 0)[0].level == "red"
    assert smi_says(tmp_path, monkeypatch, "echo no devices; exit 6") == "no devices"


# ---------------------------------------------------------------- several machines


def test_machines_are_laid_side_by_side() -> None:
    slow: Finding = red("disk", "full", "why", "remedy")
    merged = together([("n1", [green("memory", "10"), slow]), ("n2", [green("memory", "11")]), ("n3", [slow])])
    assert [(f.check, f.where) for f in merged] == [("memory", "n1 and 1 more like it"), ("disk", "n1, n3")]
    assert together([("n1", [slow]), ("n2", [slow])]) == [slow]


def test_ranks_of_other_versions_are_red_and_of_other_speed_yellow() -> None:
    table = [{"host": f"n{rank // 2}", "torch": "2.13.0", "processors": "8"} for rank in range(4)]
    assert worst(ranks.compare(table)) == "green"
    table[3] |= {"torch": "2.12.0", "processors": "4"}
    found = {finding.check: finding for finding in ranks.compare(table)}
    assert {name: finding.level for name, finding in found.items()} == {
        "ranks: torch": "red",
        "ranks: processors": "yellow",
    }
    assert found["ranks: torch"].found == "2.13.0 on rank 0, 1, 2 (n0, n1); 2.12.0 on rank 3 (n1)"


# ---------------------------------------------------------------- a run that is to start here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small run whose shards are there."""
    import yaml

    sys.path.insert(0, str(Path(__file__).parent / "train"))
    import train_children

    folder = tmp_path_factory.mktemp("world")
    train_children.make_world(folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(train_children.settings(folder, folder / "runs" / "one")))
    return path


def test_a_run_that_could_start_and_one_that_has_no_room(
    run: Path, tmp_path: Path, small_disk: Callable[..., Any]
) -> None:
    from megaprior.config import load_config
    from megaprior.train.run import RunConfig, train

    facts = planned.look(str(run), [], 1)
    assert facts["checkpoints"] == 2  # 6 steps, one every 3
    assert planned.look(str(run), ["save_every=1"], 1)["checkpoints"] == 6
    assert planned.look(str(run), ["save_every=1", "keep_last=2"], 1)["checkpoints"] == 3
    train(load_config(RunConfig, run, [f"out={tmp_path / 'trained'}"]))
    size = planned.look(str(run), [f"out={tmp_path / 'trained'}"], 1)["checkpoint"]
    assert facts["checkpoint"] == pytest.approx(size, rel=0.1)  # 5% measured: manifest, tokenizer, file headers
    small = tmp_path / "small"
    small.mkdir()
    with small_disk(small, "300m"):
        code, report = doctor("--config", run, "--set", f"out={small / 'run'}", "steps=6000", cwd=ROOT)
    assert code == 1
    assert levels(report)["configuration"] == "green"
    assert "needed 1." in of(report, f"folder {small}")["found"]


def test_a_configuration_that_could_not_start_is_red_with_trains_own_words(run: Path) -> None:
    code, report = doctor("--config", run, "--set", "data.train.0.path=nowhere")
    assert code == 1
    assert of(report, "configuration")["found"].startswith("nowhere/tokenizer: No such file or directory")
