"""A training step of ours beside a plain transformers loop: taking turns, equal losses first, then speed and memory.

    ours   megaprior's loader, packed rows, engine
    plain  what one writes with transformers alone: one padded batch, logits for every position

Both read the same samples of the same shards with as many decoding threads, nothing cached or prepared ahead, start from the
same weights, clip at the same norm and use the same fused AdamW in fp32. They take turns step by step in one process, so that
a busy machine slows both. Losses of every step are compared before a number is printed. Peak memory is that of one process
per arm.

Letters: B batch, T padded tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from megaprior.data.images import decode_rgb
from megaprior.data.loader import DataConfig, Loader, SourceConfig
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.objectives.base import Step
from megaprior.objectives.weighted_ntp import WeightedNTP
from megaprior.tokenizer import Tokenizer, load_tokenizer
from megaprior.train.engine import LocalEngine
from megaprior.train.optim import OptimConfig, adamw, clip_scale

RESULTS = Path(__file__).parent / "results"
DECODERS = 2
# fp32 losses of about 10 that two orders of summation and as many updates may part.
TOLERANCE = 1e-5


class Arm(ABC):
    """One way to train: `step` makes the update of one optimizer step."""

    @abstractmethod
    def step(self, number: int) -> tuple[float, int]:
        """(loss, caption tokens) of one optimizer step."""


class Ours(Arm):
    """megaprior's loader, objective and engine around a model of ours."""

    def __init__(self, options: argparse.Namespace, tokenizer: Tokenizer, model: Any, *, lr: float) -> None:
        self._optim = OptimConfig(lr=lr)
        self.loader = new_loader(options, tokenizer, vision_spec(model))
        self.engine = LocalEngine(Step(model, WeightedNTP()), self._optim, precision="fp32", device=torch.device("cpu"))

    def step(self, number: int) -> tuple[float, int]:
        """See `Arm`."""
        batch = self.loader.batch(number)
        for row in batch.micro:
            self.engine.accumulate(row, torch.zeros(len(row.targets), dtype=torch.int64), last=row is batch.micro[-1])
        norm2, loss, _ = self.engine.sums()
        self.engine.update(lr=self._optim.lr, scale=clip_scale(norm2**0.5, self._optim.clip))
        return loss, batch.num_loss_tokens


class Plain(Arm):
    """A right-padded batch through a stock model. `module(input_ids, mask, labels, patches)`, int64 [B, T] and uint8 [P, D],
    returns the mean loss."""

    def __init__(
        self, options: argparse.Namespace, tokenizer: Tokenizer, module: nn.Module, spec: VisionSpec, *, lr: float
    ) -> None:
        self.tokenizer, self.module, self.spec, self._optim = tokenizer, module, spec, OptimConfig(lr=lr)
        self.shards = ShardSet.open(options.shards)
        self.order = new_loader(options, tokenizer, spec)  # tells which samples a step has, nothing else
        self.optimizer = adamw(module, self._optim, fused=True)
        self.pool = ThreadPoolExecutor(DECODERS)

    def step(self, number: int) -> tuple[float, int]:
        """See `Arm`."""
        samples = list(self.pool.map(self.sample, self.order.sample_ids(number).tolist()))
        length = max(len(ids) for ids, _, _ in samples)
        input_ids = torch.full((len(samples), length), self.tokenizer.eos_id)
        mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
        for i, (ids, caption, _) in enumerate(samples):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
            labels[i, len(ids) - caption : len(ids)] = input_ids[i, len(ids) - caption : len(ids)]
        patches = torch.from_numpy(np.concatenate([p for _, _, p in samples]))
        self.optimizer.zero_grad()
        loss = self.module(input_ids, mask, labels, patches)
        loss.backward()
        trained = [p for p in self.module.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, self._optim.clip)
        self.optimizer.step()
        return loss.item(), sum(caption for _, caption, _ in samples)

    def sample(self, index: int) -> tuple[list[int], int, np.ndarray]:
        """(token ids, how many at their end are the caption's, patches uint8 [P, D])."""
        caption, sizes = self.shards.tokens(index).tolist(), self.shards.image_sizes
        assert sizes is not None
        grid = self.spec.grid((int(sizes[index, 0]), int(sizes[index, 1])))
        patches = self.spec.patches(decode_rgb(self.shards.image(index)), grid)
        image, _ = self.spec.layout(*grid)
        return [self.tokenizer.bos_id, *image.tolist(), *caption], len(caption), patches


def vision_spec(model: Any) -> VisionSpec:
    """Geometry and role ids as the data room takes them."""
    spec = VisionSpec.of(model.config)
    assert spec is not None
    return spec


def new_loader(options: argparse.Namespace, tokenizer: Tokenizer, spec: VisionSpec) -> Loader:
    """The batches that our arm trains on and whose order both follow; every image is decoded when it is needed."""
    data = DataConfig(
        train=[SourceConfig(path=str(options.shards))],
        scores=None,
        batch_size=options.batch,
        max_tokens=options.row_tokens,
        workers=DECODERS,
        cache_mb=0,
    )
    return Loader(data, seed=0, weighting=WeightingConfig(kind="ntp"), spec=spec, tokenizer=tokenizer)


ARMS = ("ours", "plain")


def measure_speed(options: argparse.Namespace, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Step times and losses of both arms, taking turns; refuses where losses differ."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    losses: dict[str, list[float]] = {name: [] for name in arms}
    tokens: list[int] = []
    for number in range(options.warmup + options.steps):
        counts = {}
        for name in list(arms)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            loss, counts[name] = arms[name].step(number)
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(loss)
        gap = abs(losses["ours"][-1] - losses["plain"][-1])
        if counts["ours"] != counts["plain"] or gap > TOLERANCE:
            raise SystemExit(
                f"step {number}: the arms do not compute the same loss (ours {losses['ours'][-1]} over {counts['ours']} "
                f"tokens, plain {losses['plain'][-1]} over {counts['plain']}): nothing to compare"
            )
        tokens.append(counts["ours"])
    timed = slice(options.warmup, None)
    rates = {name: [n / s for n, s in zip(tokens[timed], seconds[name][timed], strict=True)] for name in arms}
    gaps = [abs(a - b) for a, b in zip(losses["ours"], losses["plain"], strict=True)]
    return {
        "caption_tokens": tokens[timed],
        "seconds": {name: values[timed] for name, values in seconds.items()},
        "tokens_per_s": rates,
        "median": {name: statistics.median(values) for name, values in rates.items()},
        "speedup": [a / b for a, b in zip(rates["ours"], rates["plain"], strict=True)],
        "losses": losses,
        "largest_loss_gap": max(gaps),
    }


def measure_memory(module: str) -> dict[str, dict[str, float]]:
    """MiB of each arm, each in a process of its own."""
    results = {}
    for name in ARMS:
        command = [sys.executable, "-m", module, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=RESULTS.parents[1])
        results[name] = json.loads(done.stdout)
    return results


def report_memory(arm: Arm) -> None:
    """Print, as JSON, this process's peak resident MiB before the first step and after three."""
    before = peak_mib()
    for number in range(3):
        arm.step(number)
    print(json.dumps({"before_mib": before, "peak_mib": peak_mib()}))


def peak_mib() -> float:
    """Largest resident size of this process so far (getrusage's would count the parent's, which fork hands on)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))


def markdown(result: dict[str, Any]) -> str:
    """The table that is kept beside the raw samples."""
    speed, memory = result["speed"], result["memory"]
    rows = []
    for name in ARMS:
        low, _, high = statistics.quantiles(speed["tokens_per_s"][name], n=4)
        numbers = [speed["median"][name], low, high, memory[name]["peak_mib"], memory[name]["before_mib"]]
        rows.append(f"| {name} | " + " | ".join(f"{number:,.0f}" for number in numbers) + " |")
    low, middle, high = statistics.quantiles(speed["speedup"], n=4)
    return f"""# {result["title"]}

`{result["command"]}`, {result["date"]}; {result["machine"]}; {result["versions"]}.

{result["model"]}

Batch {result["batch"]} pairs, vocabulary {result["vocabulary"]:,}, {result["steps"]} timed steps of each arm, taking turns, after
{result["warmup"]} to warm up; torch threads: {result["threads"]}, fp32. Losses agree to {speed["largest_loss_gap"]:.1e}.

| arm | caption tokens/s, median | lower quartile | upper quartile | peak memory, MiB | before the first step, MiB |
|---|--:|--:|--:|--:|--:|
{chr(10).join(rows)}

Ours / plain, step by step: median **{middle:.2f}x**, quartiles {low:.2f} to {high:.2f}.
"""


def run(name: str, *, doc: str | None, title: str, arms: Any, model: str, argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, keep it with the raw samples as results/NAME.json and .md.

    Args:
        name: of the module `benchmarks.NAME` that calls this.
        arms: (options, tokenizer) -> {"ours": a function that makes the arm, "plain": another}.
        model: what both train, in a sentence.
    """
    options = _options(doc, argv)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # transformers imports DeepSpeed when it saves, which looks for a GPU aloud
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.tokenizer)
    makers = arms(options, tokenizer)
    assert tuple(makers) == ARMS
    if options.memory_of:
        report_memory(makers[options.memory_of]())
        return
    result = {
        "title": title,
        "model": model,
        "command": f"python -m benchmarks.{name} --shards DIR --tokenizer FILE",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {processor()}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "vocabulary": tokenizer.vocab_size,
        **{field: getattr(options, field) for field in ("batch", "row_tokens", "steps", "warmup", "threads")},
        "speed": measure_speed(options, {arm: make() for arm, make in makers.items()}),
        "memory": measure_memory(f"benchmarks.{name}"),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / f"{name}.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


def _options(doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="built shards of (image, caption) pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer they were built with")
    parser.add_argument("--batch", type=int, default=64, help="pairs per step")
    parser.add_argument("--row-tokens", type=int, default=2048, help="longest packed row of our arm")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per arm, at least 2")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
