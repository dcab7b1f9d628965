"""The planned memory of a step against the measured one: tensor bytes above the process's baseline, on CPU.

    python -m benchmarks.plan_memory --output benchmarks/results/plan_memory_cpu

Three models of more than 100M parameters take real steps (forward, backward, AdamW; two micro-steps each) under both engines,
ZeRO-3 with two gloo ranks. What is measured is every allocation and release that torch's CPU allocator reports to its profiler
from before the model is built: live bytes at any moment, memory inside kernels included. The planner gets the
sizes and the row, and nothing of what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

LM = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
TOWER = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 9,
    "num_attention_heads": 8,
    "image_size": 224,
    "patch_size": 16,
}
IMAGE_ID = 4


@dataclass(frozen=True)
class Case:
    """One measurement: `captions` are the caption tokens of a row's segments, each with an image where the model sees."""

    model: str
    engine: str
    precision: str
    checkpointing: str = "none"
    captions: tuple[int, ...] = (90, 120, 60, 110, 40, 80)
    grid: tuple[int, int] = (7, 5)  # of a U-LVLM's images
    lm: dict[str, Any] = field(default_factory=lambda: dict(LM))
    tower: dict[str, Any] = field(default_factory=lambda: dict(TOWER))
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """Processes."""
        return 2 if self.engine == "zero3" else 1

    @property
    def name(self) -> str:
        """For tables."""
        options = "".join(f", {key.removeprefix('stage3_')} {value:,}" for key, value in self.zero.items())
        kept = "" if self.checkpointing == "none" else f", {self.checkpointing} checkpointing"
        return f"{self.model}, {self.engine}, {self.precision}{kept}{options}"


def cases() -> list[Case]:
    """What is measured."""
    small = {"reduce_bucket_size": 20_000_000}
    close = {**small, "stage3_prefetch_bucket_size": 5_000_000, "stage3_max_reuse_distance": 0}
    found = []
    for model in ("reference", "ulvlm", "hlvlm"):
        found += [Case(model, "local", "fp32"), Case(model, "local", "bf16")]
        found += [Case(model, "zero3", "fp32", zero=small), Case(model, "zero3", "bf16", zero=small)]
    found += [
        Case("reference", "local", "fp32", "full"),
        Case("reference", "local", "fp32", "selective"),
        Case("reference", "zero3", "fp32", "full", zero=close),
        Case("ulvlm", "zero3", "bf16", "full", zero=close),
    ]
    return found


# ---------------------------------------------------------------- planned


def plan(case: Case) -> dict[str, int]:
    """The planner's bytes: state at rest, peak of the micro-steps, of the update, and of all."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig

    from megaprior.planning.described import hlvlm, text_lm, ulvlm
    from megaprior.planning.memory import Row, plan_memory
    from megaprior.planning.state import Setting, Zero

    lm, tower = LlamaConfig(**case.lm), CLIPVisionConfig(**case.tower)
    model = {
        "reference": lambda: text_lm(lm),
        "ulvlm": lambda: ulvlm(lm, patch=32, limit=1024),
        "hlvlm": lambda: hlvlm(lm, tower, projector_only=True),
    }[case.model]()
    zero = Zero.of({"zero_optimization": case.zero}, size=2 if case.precision == "bf16" else 4)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    setting = Setting(case.engine, case.precision, case.checkpointing, dtype, False, zero, "cpu")  # type: ignore[arg-type]
    batch = _row(case)
    bounds = batch.cu_seqlens.tolist()
    segments = tuple(end - start for start, end in pairwise(bounds))
    images = len(case.captions) if case.model == "hlvlm" else 0
    row = Row(segments, len(batch.targets), len(batch.patches), images)
    memory = plan_memory(model, setting, row, world=case.world, micro_steps=2)
    micro = max(m.total for name, m in memory.moments.items() if name != "update")
    held = memory.state.gradients if case.engine == "local" else 0  # of a step under way
    return {
        "state": memory.state.total - held,
        "micro-steps": memory.state.total + micro,
        "update": memory.state.total + memory.moments["update"].total,
        "peak": memory.peak,
        "parameters": sum(model.trained.values()) + sum(model.frozen.values()),
    }


# ---------------------------------------------------------------- measured


def measure(case: Case, *, rank: int) -> dict[str, int]:
    """The measured bytes of this process, parts as `plan` has them; a second step, when all state exists."""
    import torch

    from megaprior.distributed import Place, connect
    from megaprior.objectives.base import Step
    from megaprior.objectives.weighted_ntp import WeightedNTP
    from megaprior.train.engine import LocalEngine
    from megaprior.train.optim import OptimConfig

    torch.set_num_threads(1)
    peers = connect(Place(rank, case.world, rank), backend="gloo", timeout_s=600)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        module = Step(_model(case), WeightedNTP())
        optim, precision = OptimConfig(lr=1e-4), case.precision
        if case.engine == "local":
            device = torch.device("cpu")
            engine: Any = LocalEngine(module, optim, precision=precision, device=device)  # type: ignore[arg-type]
        else:
            from megaprior.train.zero3 import Zero3Engine

            extras = {"zero_optimization": {"stage": 3, **case.zero}}
            engine = Zero3Engine(module, optim, peers=peers, precision=precision, extras=extras)  # type: ignore[arg-type]
        row = _row(case)
        group = torch.zeros(len(row.targets), dtype=torch.int64)
        for step in range(2):
            # ZeRO-3 knows the order of modules from its third micro-step on.
            with torch.profiler.record_function(f"step {step}"):
                for last in (False, True):
                    engine.accumulate(row, group, last=last)
                engine.sums()
                with torch.profiler.record_function(f"update {step}"):
                    engine.update(lr=1e-4, scale=1.0)
    found = _peaks(profiler)
    peers.close()
    return found


def _peaks(profiler: Any) -> dict[str, int]:
    """Live bytes from the allocator's own events, in order of time."""
    events = profiler.profiler.kineto_results.events()
    spans = {e.name(): (e.start_ns(), e.end_ns()) for e in events if e.name() in ("step 1", "update 1")}
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live, peaks = 0, {"state": 0, "micro-steps": 0, "update": 0}
    (begin, end), (update, _) = spans["step 1"], spans["update 1"]
    for at, size in memory:
        live += size
        if at < begin:
            peaks["state"] = live
        elif at < end:
            part = "update" if at >= update else "micro-steps"
            peaks[part] = max(peaks[part], live)
    peaks["peak"] = max(peaks.values())
    return peaks


def _model(case: Case) -> Any:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

    from megaprior.models.hlvlm import HLVLM, HLVLMConfig
    from megaprior.models.lm import TextLM
    from megaprior.models.ulvlm import ULVLM, ULVLMConfig
    from megaprior.models.vision import CLIP_MEAN, CLIP_STD, VisionTower

    torch.manual_seed(0)
    if case.model == "ulvlm":
        model: Any = ULVLM(ULVLMConfig(**case.lm, patch=32, limit=1024))
    elif case.model == "reference":
        model = TextLM(LlamaConfig(**case.lm))
    else:
        dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
        config = HLVLMConfig(text_config=LlamaConfig(**case.lm), vision_config=CLIPVisionConfig(**case.tower))
        lm: Any = TextLM(LlamaConfig(**case.lm))
        clip: Any = CLIPVisionModel(CLIPVisionConfig(**case.tower))
        tower = VisionTower(clip, mean=CLIP_MEAN, std=CLIP_STD)
        model = HLVLM(config, lm=lm.to(dtype), tower=tower.to(dtype), placement="replicated")
    if case.checkpointing != "none":
        model.checkpoint_activations(case.checkpointing)
    return model.train()


def _row(case: Case) -> Any:
    import numpy as np

    from megaprior.data.samples import Segment, assemble
    from megaprior.data.vision import PatchSpec, TowerSpec, VisionSpec

    spec: VisionSpec | None = None
    grid = None
    if case.model == "ulvlm":
        spec, grid = PatchSpec(32, 1024, 4, 5, 6, 7), case.grid
    elif case.model == "hlvlm":
        spec = TowerSpec(case.tower["image_size"], case.tower["patch_size"], "crop", (0, 0, 0), IMAGE_ID)
        grid = spec.grid((1, 1))
    random = np.random.default_rng(0)
    segments = []
    for number, count in enumerate(case.captions):
        patches = None
        if spec is not None and grid is not None:
            patches = random.integers(0, 256, (grid[0] * grid[1], spec.patch_values), dtype=np.uint8)
        tokens, weight = random.integers(10, 7_000, count), np.ones(count, np.float32)
        segments.append(Segment(number, tokens, weight, grid=grid, patches=patches))
    loss = sum(case.captions)
    return assemble(segments, bos_id=1, spec=spec, denominator=loss, max_tokens=8192, pad_to=1)


# ---------------------------------------------------------------- both


def compare(case: Case) -> dict[str, Any]:
    """Plan and measurement of one case, each process on its own; of two ranks the one that needs more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if case.world > 1:
        shared |= {"WORLD_SIZE": str(case.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--child", json.dumps(asdict(case))]
    ranks = []
    for rank in range(case.world):
        names = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if case.world > 1 else {}
        ranks.append(
            subprocess.Popen(
                [*command, "--rank", str(rank)], env={**shared, **names}, stdout=subprocess.PIPE, text=True
            )
        )
    answers = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise RuntimeError(f"{case.name}: a rank ended with {[process.returncode for process in ranks]}")
    measured = [json.loads(answer.splitlines()[-1]) for answer in answers]
    most = {part: max(rank[part] for rank in measured) for part in measured[0]}
    return {"case": case.name, "planned": plan(case), "measured": most}


def table(results: list[dict[str, Any]]) -> str:
    """As Markdown: MiB, and planned / measured."""
    lines = ["| case | parameters | part | planned MiB | measured MiB | ratio |", "|---|---|---|---|---|---|"]
    for result in results:
        for part, measured in result["measured"].items():
            planned = result["planned"][part]
            lines.append(
                f"| {result['case']} | {result['planned']['parameters'] / 1e6:.0f}M | {part} | {planned / 2**20:,.1f} | "
                f"{measured / 2**20:,.1f} | {planned / measured:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run all cases, or as a child one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        values = json.loads(options.child)
        case = replace(
            Case("", "", ""), **{**values, "captions": tuple(values["captions"]), "grid": tuple(values["grid"])}
        )
        print(json.dumps(measure(case, rank=options.rank)))
        return
    results = []
    for case in cases():
        if options.only in case.name:
            results.append(compare(case))
            print(table(results[-1:]).split("\n", 2)[2], flush=True)
    if options.output is not None:
        import torch

        head = f"Planned against measured tensor bytes, torch {torch.__version__} on CPU; `python -m benchmarks.plan_memory`.\n\n"
        options.output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        options.output.with_suffix(".md").write_text(head + table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
