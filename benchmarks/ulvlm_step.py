"""A training step of the tiny U-LVLM on CPU against a plain transformers loop: caption tokens per second and peak memory.

    python -m benchmarks.ulvlm_step --shards shards/flickr8k --tokenizer tokenizer.model.v1

ours   packed rows, attention per segment, a chunked head that sees loss tokens only
plain  stock LlamaForCausalLM: one right-padded batch, its own SDPA and loss, logits for all positions

Both read the same samples of the same shards with the same two decoding threads and nothing cached or prepared ahead, start
from the same weights, clip at the same norm and use the same fused AdamW in fp32. They take turns step by step in one
process, so that a busy machine slows both. Losses of every step are compared before a number is printed. Peak memory is
that of one process per arm.

Letters: B batch, T padded tokens, P patches, H width.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from megaprior.data.images import decode_rgb, patchify
from megaprior.data.loader import DataConfig, Loader, SourceConfig
from megaprior.data.shards import ShardSet
from megaprior.data.vision import VisionSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.models.lm import ModelConfig
from megaprior.models.ulvlm import ULVLM, build_ulvlm
from megaprior.objectives.base import Step
from megaprior.objectives.weighted_ntp import WeightedNTP
from megaprior.tokenizer import Tokenizer, load_tokenizer
from megaprior.train.engine import LocalEngine
from megaprior.train.optim import OptimConfig, adamw, clip_scale

RESULTS = Path(__file__).parent / "results"
OPTIM = OptimConfig(lr=1e-4)
DECODERS = 2
# fp32 losses of about 10 that two orders of summation and as many updates may part.
TOLERANCE = 1e-5


class Ours:
    """megaprior's loader, model, objective and engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        tokenizer = load_tokenizer(options.tokenizer)
        model = new_model(tokenizer)
        self.loader = new_loader(options, tokenizer, vision_spec(model))
        self.engine = LocalEngine(Step(model, WeightedNTP()), OPTIM, precision="fp32", device=torch.device("cpu"))

    def step(self, number: int) -> tuple[float, int]:
        """(loss, caption tokens) of one optimizer step."""
        batch = self.loader.batch(number)
        for row in batch.micro:
            self.engine.accumulate(row, torch.zeros(len(row.targets), dtype=torch.int64), last=row is batch.micro[-1])
        norm2, loss, _ = self.engine.sums()
        self.engine.update(lr=OPTIM.lr, scale=clip_scale(norm2**0.5, OPTIM.clip))
        return loss, batch.num_loss_tokens


class PlainModule(nn.Module):
    """Stock Llama with the U-LVLM's weights, and its patch projection."""

    def __init__(self, model: ULVLM) -> None:
        super().__init__()
        fields = model.config.to_dict()
        fields = {name: fields[name] for name in transformers.LlamaConfig().to_dict() if name in fields}
        fields.pop("model_type")
        self.lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
        weights = model.state_dict()
        self.patch_embed = nn.Linear(model.patch_embed.in_features, model.config.hidden_size, bias=False)
        self.patch_embed.load_state_dict({"weight": weights.pop("patch_embed.weight")})
        self.lm.load_state_dict(weights)

    def forward(
        self, input_ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor, patches: torch.Tensor, patch_id: int
    ) -> torch.Tensor:
        """input_ids, mask, labels int64 [B, T], patches uint8 [P, 3 * patch^2] -> mean loss, 0-d."""
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = ((patches.view(len(patches), -1, 3) / 255 - mean) / std).flatten(1)
        embeds = self.lm.get_input_embeddings()(input_ids)
        embeds = embeds.index_put((input_ids == patch_id,), self.patch_embed(pixels), accumulate=True)
        return self.lm(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss


class Plain:
    """What one writes with transformers alone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokenizer = load_tokenizer(options.tokenizer)
        self.shards = ShardSet.open(options.shards)
        model = new_model(self.tokenizer)
        self.spec = vision_spec(model)
        self.order = new_loader(options, self.tokenizer, self.spec)  # tells which samples a step has, nothing else
        self.module = PlainModule(model)
        self.optimizer = adamw(self.module, OPTIM, fused=True)
        self.pool = ThreadPoolExecutor(DECODERS)

    def step(self, number: int) -> tuple[float, int]:
        """(loss, caption tokens) of one optimizer step."""
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
        loss = self.module(input_ids, mask, labels, patches, self.spec.patch_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), OPTIM.clip)
        self.optimizer.step()
        return loss.item(), sum(caption for _, caption, _ in samples)

    def sample(self, index: int) -> tuple[list[int], int, np.ndarray]:
        """(token ids, how many at their end are the caption's, patches uint8 [P, 3 * patch^2])."""
        spec, caption = self.spec, self.shards.tokens(index).tolist()
        sizes = self.shards.image_sizes
        assert sizes is not None
        columns, rows = spec.grid((int(sizes[index, 0]), int(sizes[index, 1])))
        image = decode_rgb(self.shards.image(index))
        patches = patchify(image, patch=spec.patch, size=(columns * spec.patch, rows * spec.patch))
        grid = ([spec.patch_id] * columns + [spec.row_id]) * rows
        return [self.tokenizer.bos_id, spec.start_id, *grid[:-1], spec.end_id, *caption], len(caption), patches


def new_model(tokenizer: Tokenizer) -> ULVLM:
    """The tiny U-LVLM with four appended roles, the same for both arms."""
    config = ModelConfig(preset="tiny", vision_roles="append")
    ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    return build_ulvlm(config, **ids, roles=None, seed=0)


def vision_spec(model: ULVLM) -> VisionSpec:
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


ARMS = {"ours": Ours, "plain": Plain}


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Step times and losses of both arms, taking turns; refuses where losses differ."""
    arms = {name: arm(options) for name, arm in ARMS.items()}
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


def measure_memory() -> dict[str, dict[str, float]]:
    """MiB of each arm, each in a process of its own."""
    results = {}
    for name in ARMS:
        command = [sys.executable, "-m", "benchmarks.ulvlm_step", *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=RESULTS.parents[1])
        results[name] = json.loads(done.stdout)
    return results


def report_memory(options: argparse.Namespace) -> None:
    """Print, as JSON, this process's peak resident MiB before the first step and after three."""
    arm = ARMS[options.memory_of](options)
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
    return f"""# A training step of the tiny U-LVLM on CPU

`{result["command"]}`, {result["date"]}; {result["machine"]}; {result["versions"]}.

Batch {result["batch"]} pairs, vocabulary {result["vocabulary"]:,}, {result["steps"]} timed steps of each arm, taking turns,
after {result["warmup"]} to warm up; torch threads: {result["threads"]}, fp32. Losses agree to {speed["largest_loss_gap"]:.1e}.

| arm | caption tokens/s, median | lower quartile | upper quartile | peak memory, MiB | before the first step, MiB |
|---|--:|--:|--:|--:|--:|
{chr(10).join(rows)}

Ours / plain, step by step: median **{middle:.2f}x**, quartiles {low:.2f} to {high:.2f}.
"""


def main() -> None:
    """Measure, print the table, keep it with the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="built shards of (image, caption) pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer they were built with")
    parser.add_argument("--batch", type=int, default=64, help="pairs per step")
    parser.add_argument("--row-tokens", type=int, default=2048, help="longest packed row of our arm")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per arm, at least 2")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for ulvlm_step.json and .md")
    parser.add_argument("--memory-of", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(options)
        return
    result = {
        "command": "python -m benchmarks.ulvlm_step --shards DIR --tokenizer FILE",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {processor()}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "batch": options.batch,
        "row_tokens": options.row_tokens,
        "vocabulary": load_tokenizer(options.tokenizer).vocab_size + 4,
        "steps": options.steps,
        "warmup": options.warmup,
        "threads": options.threads,
        "speed": measure_speed(options),
        "memory": measure_memory(),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "ulvlm_step.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (options.output / "ulvlm_step.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
