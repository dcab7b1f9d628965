"""The whole plan of one run: memory, traffic and time on one number of GPUs, and a table over many."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megaprior.errors import UsageError
from megaprior.planning.described import Described, describe
from megaprior.planning.hardware import Assumptions, Gpu
from megaprior.planning.memory import Memory, Prepared, Row, plan_memory, prepare
from megaprior.planning.speed import Speed, plan_speed
from megaprior.planning.state import Setting
from megaprior.planning.workload import Guess, Workload, workload
from megaprior.train.settings import RunConfig

Limit = Literal["memory", "batch", "network", "arithmetic"]
COUNTS = tuple(2**power for power in range(11))
_BUSY = 0.5  # of the GPUs' time; below, the batch is too small for so many


@dataclass(frozen=True)
class Point:
    """One number of GPUs: its memory (of the row that needs most), its speed, and what limits it."""

    gpus: int
    memory: Memory
    speed: Speed
    fits: bool
    limit: Limit

    def hours(self, steps: int) -> float:
        """Of so many steps, without evaluations and checkpoints."""
        return self.speed.step * steps / 3600


@dataclass(frozen=True)
class Plan:
    """Everything that is printed.

    Attributes:
        chosen: the number of GPUs that was asked for.
        points: others, for the table.
        modes: peak bytes by activation_checkpointing, on the number of GPUs that was asked for.
        advice: one line, where it does not fit or wastes most of its GPUs.
    """

    cfg: RunConfig
    model: Described
    work: Workload
    gpu: Gpu
    assumed: Assumptions
    chosen: Point
    points: tuple[Point, ...]
    modes: dict[str, int]
    advice: str | None

    @property
    def notes(self) -> list[str]:
        """What the figures rest on."""
        return [*self.model.notes, *self.work.notes, *self.assumed.describe(self.gpu)]


def make_plan(
    cfg: RunConfig,
    *,
    gpus: int,
    gpu: Gpu,
    assumed: Assumptions,
    guess: Guess,
    model_config: str | None = None,
    tower_config: str | None = None,
    counts: tuple[int, ...] = COUNTS,
) -> Plan:
    """Plan a run on `gpus` GPUs and on each of `counts`.

    Raises:
        UsageError: engine=local with several GPUs, or `describe` and `workload` do not know enough.
        DataError: a config.json or shards are refused.
    """
    if cfg.engine == "local":
        if gpus > 1:
            raise UsageError(f"engine=local trains on one process, --gpus is {gpus}: plan it with engine=zero3")
        counts = (1,)
    model = describe(cfg, model_config=model_config, tower_config=tower_config, vocabulary=None)
    work, setting = workload(cfg, model, guess), Setting.of(cfg)
    rows = work.longest()
    prepared = [(row, prepare(model, setting, row, micro_steps=2)) for row in rows]

    def point(count: int) -> Point:
        speed = plan_speed(model, setting, work, prepared[0][1].gathers, gpus=count, gpu=gpu, assumed=assumed)
        memory = _worst(model, setting, prepared, count)
        return Point(count, memory, speed, memory.peak <= gpu.usable, _limit(memory, speed, gpu))

    chosen = point(gpus)
    modes = {}
    for mode in ("none", "selective", "full"):
        other = replace(setting, checkpointing=mode)
        peaks = [plan_memory(model, other, row, world=gpus, micro_steps=2).peak for row in rows]
        modes[mode] = max(peaks)
    points = tuple(chosen if count == gpus else point(count) for count in counts)
    advice = _advice(cfg, setting, chosen, points, modes, gpu)
    return Plan(cfg, model, work, gpu, assumed, chosen, points, modes, advice)


def _worst(model: Described, setting: Setting, prepared: list[tuple[Row, Prepared]], world: int) -> Memory:
    plans = [plan_memory(model, setting, row, world=world, micro_steps=2, prepared=ready) for row, ready in prepared]
    return max(plans, key=lambda memory: memory.peak)


def _limit(memory: Memory, speed: Speed, gpu: Gpu) -> Limit:
    if memory.peak > gpu.usable:
        return "memory"
    if speed.busy < _BUSY:
        return "batch"
    return "network" if speed.exposed > 0.25 * speed.step else "arithmetic"


def _advice(
    cfg: RunConfig, setting: Setting, chosen: Point, points: tuple[Point, ...], modes: dict[str, int], gpu: Gpu
) -> str | None:
    if chosen.fits:
        if chosen.limit != "batch":
            return None
        busy = [point.gpus for point in points if point.fits and point.limit != "batch"]
        most = f"; {max(busy)} GPUs keep busy" if busy else ""
        return f"a step has too few tokens for {chosen.gpus} GPUs{most}: take fewer, or raise data.batch_size"
    lighter = [mode for mode in ("selective", "full") if modes[mode] <= gpu.usable and modes[mode] < chosen.memory.peak]
    if lighter:
        return f"set activation_checkpointing={lighter[0]}: {modes[lighter[0]] / 2**30:.1f} GiB"
    more = [point.gpus for point in points if point.fits and point.gpus > chosen.gpus]
    offload = setting.engine == "zero3" and not setting.zero.offload and chosen.memory.state.optimizer > 0
    parts = [f"take {more[0]} GPUs" if more else "", "zero=launch/deepspeed/zero3_offload.json" if offload else ""]
    parts.append("model.frozen=partitioned" if chosen.memory.state.frozen > gpu.usable / 2 else "")
    known = [part for part in parts if part] or [
        f"lower data.max_tokens (now {cfg.data.max_tokens:,}) or take a larger GPU"
    ]
    return " or ".join(known)


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values: bytes, seconds, shares."""
    return {
        "run": {
            "stage": plan.cfg.stage,
            "steps": plan.cfg.steps,
            "engine": plan.cfg.engine,
            "precision": plan.cfg.precision,
        },
        "gpu": {**vars(plan.gpu), "usable": plan.gpu.usable},
        "assumptions": plan.notes,
        "parameters": {"trained": sum(plan.model.trained.values()), "frozen": sum(plan.model.frozen.values())},
        "batch": {
            "samples": len(plan.work.segment),
            "tokens": int(plan.work.segment.sum()),
            "loss_tokens": int(plan.work.loss.sum()),
        },
        "chosen": _point(plan, plan.chosen),
        "checkpointing_peak": plan.modes,
        "advice": plan.advice,
        "table": [_point(plan, point) for point in plan.points],
    }


def _point(plan: Plan, point: Point) -> dict[str, Any]:
    moment = point.memory.moments[point.memory.worst]
    speed = {name: value for name, value in vars(point.speed).items() if name not in ("traffic", "gpus")}
    return {
        "gpus": point.gpus,
        "fits": point.fits,
        "limit": point.limit,
        "memory": {
            **vars(point.memory.state),
            "peak": point.memory.peak,
            "moment": {"name": point.memory.worst, **vars(moment)},
        },
        "speed": {**speed, "step": point.speed.step, **{f"{k}_bytes": v for k, v in vars(point.speed.traffic).items()}},
        "hours": point.hours(plan.cfg.steps),
    }
