"""Kill builds with SIGKILL at random moments, resume them, and compare every byte with a build that was left alone.

    python -m benchmarks.build_crashes --kills 100 --input pairs/*.tar --tokenizer tokenizer.model

The ways of running take turns: one process, several workers, parts and their join, ranks of mpirun where there is one. The
victim is drawn too: the builder, one of its workers or ranks, or all at once. After every kill

    nobody of the killed build is left after some seconds;
    `verify` and a reader say that the build is not complete, or it is, and then every byte is right;
    every shard that has its manifest has the right bytes;

and after the last resume the folder holds the right files and nothing else. The first that does not hold ends the run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megaprior.data.shards import ShardSet, verify
from megaprior.errors import DataError

RESULTS = Path(__file__).parent / "results" / "build_crashes.md"
MPIRUN = shutil.which("mpirun") or shutil.which("mpirun", path=str(Path(sys.executable).parent))
_CLI = (sys.executable, "-m", "megaprior.data_tools.cli")
_LEFTOVERS = (".building", ".lock")  # of a build that was killed after build.json was written


@dataclass(frozen=True)
class Way:
    """A way of running: the commands that run at the same time, then the command that completes the build."""

    name: str
    together: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] | None = None


def ways(build: Sequence[str], output: Path) -> list[Way]:
    """All ways of running that this machine offers; `build` is the command line without an output folder."""
    whole = (*_CLI, "build", *build, "--output", str(output))
    parts = tuple((*whole, "--workers", "1", "--part", f"{part}/3") for part in range(3))
    found = [
        Way("one process", ((*whole, "--workers", "1"),)),
        Way("3 workers", ((*whole, "--workers", "3"),)),
        Way("3 parts, then join", parts, (*_CLI, "join", str(output))),
    ]
    if MPIRUN:
        found.append(
            Way(
                "mpirun -n 2",
                ((MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", *whole, "--workers", "1"),),
            )
        )
    return found


@dataclass
class Tally:
    """What one way of running went through."""

    kills: Counter[str] = field(default_factory=Counter)  # by victim
    moments: Counter[str] = field(default_factory=Counter)  # by how far the build was
    builds: int = 0
    bytes: int = 0


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---------------------------------------------------------------- processes


def session(leader: int) -> dict[int, tuple[int, str]]:
    """The living processes of a session: pid -> (parent, command line)."""
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdecimal():
            continue
        try:
            fields = Path(entry.path, "stat").read_text().rpartition(")")[2].split()
            command = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found[int(entry.name)] = (int(fields[1]), command)
    return found


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Run a command in a session of its own, so that all its processes can be found."""
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def strike(process: subprocess.Popen[bytes], draw: random.Random) -> str | None:
    """SIGKILL the leader, one of the processes it started, or all; says which, None when it had ended already."""
    if process.poll() is not None:
        return None
    members = session(process.pid)
    children = [
        pid for pid, (_, line) in members.items() if "spawn_main" in line or (MPIRUN and "data_tools.cli" in line)
    ]
    children = [pid for pid in children if pid != process.pid]
    victim = draw.choice(["all", "leader", "child", "child"]) if children else "leader"
    chosen = {"all": list(members), "leader": [process.pid], "child": [draw.choice(children or [0])]}[victim]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            if victim == "child":
                return None
    return "a worker or rank" if victim == "child" else "everybody" if victim == "all" else "the builder"


def settle(process: subprocess.Popen[bytes], seconds: float = 20.0) -> str:
    """What the command said; everybody it started must end soon after it."""
    said = process.communicate(timeout=60)[0].decode(errors="replace")
    deadline = time.monotonic() + seconds
    while left := session(process.pid):
        assert time.monotonic() < deadline, f"still running after the build's end: {left}"
        time.sleep(0.02)
    return said


# ---------------------------------------------------------------- one build, killed until it is complete


@dataclass
class Crasher:
    """Kills and resumes builds of one input; `truth` is what a build that was left alone holds."""

    truth: dict[str, str]
    draw: random.Random
    say: Callable[[str], None]

    def until_complete(self, way: Way, output: Path, tally: Tally, *, kills: int, seconds: float) -> int:
        """Build once, with at most `kills` kills, each within `seconds` of a start; returns how many there were."""
        done = 0
        while True:
            wanted = done < kills
            ended = [self._round(way.together, output, tally, seconds if wanted else None)]
            if way.after and not ended[0]:
                ended.append(
                    self._round((way.after,), output, tally, 1.0 if wanted and self.draw.random() < 0.5 else None)
                )
            done += sum(ended)
            if not any(ended):
                break
        found = contents(output)
        assert found == self.truth, f"{way.name}: differs in {found.items() ^ self.truth.items()}"
        assert verify(output) == []
        tally.builds += 1
        tally.bytes += sum((output / name).stat().st_size for name in found)
        return done

    def _round(self, commands: Sequence[Sequence[str]], output: Path, tally: Tally, within: float | None) -> bool:
        """Run commands at the same time; kill one of them at a random moment, unless it is faster. Whether it was killed."""
        running = [start(command) for command in commands]
        victim, struck, reached = self.draw.choice(running), None, ""
        if within is not None:
            moment = time.monotonic() + self.draw.uniform(0, within)
            while time.monotonic() < moment and victim.poll() is None:
                time.sleep(0.001)
            reached = moment_of(output)
            struck = strike(victim, self.draw)
        said = {process.pid: settle(process) for process in running}
        complete = (output / "build.json").exists()
        for process in running:
            if process is not victim or struck is None:
                assert process.returncode == 0, said[process.pid]
        if struck is None:
            return False
        self.check_truth(output)
        tally.kills[struck] += 1
        tally.moments[reached] += 1
        if struck == "a worker or rank" and not complete:
            assert victim.returncode, said[victim.pid]
            if "mpirun" not in str(commands[0][0]):
                for words in ("was killed by SIGKILL", "repeat the command to go on"):
                    assert words in said[victim.pid], said[victim.pid]
        self.say(f"{struck}, {reached}")
        return True

    def check_truth(self, output: Path) -> None:
        """What anybody may read is right."""
        for manifest in output.glob("[0-9]*.json"):
            for path in output.glob(f"{manifest.stem}.*"):
                assert hashlib.sha256(path.read_bytes()).hexdigest() == self.truth[path.name], path
        problems = verify(output) if output.exists() else []
        if (output / "build.json").exists():
            assert all(any(name in problem for name in _LEFTOVERS) for problem in problems), problems
            ShardSet.open(output)
            found = {name: digest for name, digest in contents(output).items() if not name.startswith(_LEFTOVERS)}
            assert found == self.truth, found.items() ^ self.truth.items()
            return
        assert not output.exists() or "the build is not complete" in problems[0], problems
        try:
            ShardSet.open(output)
        except DataError:
            return
        raise AssertionError(f"{output}: a reader opened an incomplete build")


def moment_of(output: Path) -> str:
    """How far a build was when it was killed."""
    if (output / "build.json").exists():
        return "after build.json"
    if not (output / ".building" / "plan.json").exists():
        return "before the plan"
    shards = len(list(output.glob("[0-9]*.json")))
    if (output / "tokenizer").exists() or (output / "quarantine.jsonl").exists():
        return "while committing"
    half = "in a shard" if list(output.glob(".[0-9]*.tmp-*")) else "between shards"
    return f"{half}, {'some' if shards else 'none'} finished"


def run(build: Sequence[str], folder: Path, *, kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Tally]:
    """Kill `kills` times, the ways of running in turn."""
    began = time.monotonic()
    straight = subprocess.run(
        [*_CLI, "build", *build, "--output", str(folder / "straight"), "--workers", "1"], capture_output=True, text=True
    )
    assert straight.returncode == 0, straight.stderr
    seconds = time.monotonic() - began
    crasher = Crasher(contents(folder / "straight"), random.Random(seed), say)
    tallies: dict[str, Tally] = {}
    done = number = 0
    while done < kills:
        output = folder / f"killed{number}"
        way = ways(build, output)[number % len(ways(build, output))]
        say(f"build {number}, {way.name}; {done} of {kills} kills")
        tally = tallies.setdefault(way.name, Tally())
        done += crasher.until_complete(
            way, output, tally, kills=min(kills - done, crasher.draw.randint(1, 8)), seconds=seconds
        )
        shutil.rmtree(output)
        number += 1
    return tallies


def table(tallies: dict[str, Tally]) -> str:
    """The result as markdown."""
    lines = [
        "| way of running | kills | of whom | when | builds completed and compared | MB compared |",
        "|---|---|---|---|---|---|",
    ]
    for name, tally in tallies.items():
        whom = ", ".join(f"{count} {victim}" for victim, count in tally.kills.most_common())
        when = ", ".join(f"{count} {moment}" for moment, count in tally.moments.most_common())
        lines.append(
            f"| {name} | {tally.kills.total()} | {whom} | {when} | {tally.builds} | {tally.bytes / 1e6:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--tokenizer", required=True, metavar="FILE")
    options = parser.parse_args()
    build = ["--input", *options.input, "--tokenizer", options.tokenizer]
    with tempfile.TemporaryDirectory() as folder:
        tallies = run(
            build, Path(folder), kills=options.kills, seed=options.seed, say=lambda line: print(line, flush=True)
        )
    names = " ".join(Path(name).name for name in options.input)
    total = sum(tally.kills.total() for tally in tallies.values())
    text = (
        f"# Builds killed {total} times\n\n`python -m benchmarks.build_crashes --kills {options.kills} --seed {options.seed}` on "
        f"{names}, tokenizer {Path(options.tokenizer).name}. After each kill verify and a reader were asked, every finished\n"
        "shard was compared, and after the last resume all bytes of the folder: no difference.\n\n" + table(tallies)
    )
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
