"""A plan for people: tables with rich on a terminal, the same as plain lines elsewhere, or Markdown for documents."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megaprior.planning.plan import Plan, Point

_HEAD = (
    "GPUs",
    "peak GiB",
    "fits",
    "rows",
    "longest",
    "busy",
    "step s",
    "exposed s",
    "traffic GB",
    "MFU",
    "hours",
    "limit",
)


def show(plan: Plan, *, markdown: bool = False) -> None:
    """Print it."""
    if sys.stdout.isatty() and not markdown:
        _rich(plan)
    else:
        print(text(plan, markdown=markdown))


def text(plan: Plan, *, markdown: bool = False) -> str:
    """All of it as lines."""
    lines = [*_summary(plan), ""]
    lines += _lines(("part", "GiB"), _memory(plan), markdown=markdown)
    lines += ["", *_lines(_HEAD, [_cells(plan, point) for point in plan.points], markdown=markdown)]
    if plan.advice:
        lines += ["", f"advice: {plan.advice}"]
    return "\n".join([*lines, "", "a forecast, not a measurement:", *(f"  {note}" for note in plan.notes)])


def _summary(plan: Plan) -> list[str]:
    cfg, point = plan.cfg, plan.chosen
    trained, frozen = sum(plan.model.trained.values()), sum(plan.model.frozen.values())
    speed, work = point.speed, plan.work
    days = point.hours(cfg.steps) / 24
    return [
        f"stage {cfg.stage}: {trained:,} parameters train" + (f", {frozen:,} are frozen" if frozen else "")
        + f"; engine {cfg.engine}, {cfg.precision}, activation_checkpointing {cfg.activation_checkpointing}",
        f"a step: {len(work.segment):,} samples, {int(work.segment.sum()):,} tokens, {int(work.loss.sum()):,} in the loss",
        f"on {point.gpus} {plan.gpu.name}: {speed.micro_steps} row(s) of at most {speed.longest:,} tokens each GPU"
        + (f", {speed.idle} GPUs have none" if speed.idle else ""),
        f"time: {speed.arithmetic:.2f} s arithmetic, {speed.communication:.2f} s communication, {speed.exposed:.2f} s of it "
        f"exposed, {speed.update:.2f} s update: {speed.step:.2f} s a step, {cfg.steps:,} steps in "
        f"{point.hours(cfg.steps):,.1f} hours ({days:.1f} days); limited by {point.limit}",
    ]  # fmt: skip


def _memory(plan: Plan) -> list[list[str]]:
    memory = plan.chosen.memory
    state, moment = memory.state, memory.moments[memory.worst]
    rows = [
        ("parameters that train", state.parameters),
        ("gradients", state.gradients),
        ("optimizer (fp32 masters, two moments)", state.optimizer),
        ("frozen parameters", state.frozen),
        ("communication bucket", state.buckets),
        ("activations kept", moment.kept),
        ("module at work", moment.working),
        ("gathered parameters", moment.whole),
        ("gradients on their way", moment.gradients),
        (f"peak ({memory.worst})", memory.peak),
        (f"usable on {plan.gpu.name}", int(plan.gpu.usable)),
    ]
    rows += [(f"peak with activation_checkpointing={mode}", peak) for mode, peak in plan.modes.items()]
    if state.host:
        rows.append(("in the machine's memory, each GPU", state.host))
    return [[name, f"{size / 2**30:,.2f}"] for name, size in rows if size]


def _cells(plan: Plan, point: Point) -> list[str]:
    speed = point.speed
    return [
        f"{point.gpus:,}",
        f"{point.memory.peak / 2**30:,.1f}",
        "yes" if point.fits else "no",
        str(speed.micro_steps),
        f"{speed.longest:,}",
        f"{speed.busy:.0%}",
        f"{speed.step:,.2f}",
        f"{speed.exposed:,.2f}",
        f"{speed.traffic.total / 1e9:,.1f}",
        f"{speed.mfu:.0%}",
        f"{point.hours(plan.cfg.steps):,.1f}",
        point.limit,
    ]


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool) -> list[str]:
    if markdown:
        return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    widths = [max(len(cells[i]) for cells in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True)))
        for cells in (head, *rows)
    ]


def _rich(plan: Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for line in _summary(plan):
        console.print(line, highlight=False)
    tables = ((("part", "GiB"), _memory(plan)), (_HEAD, [_cells(plan, point) for point in plan.points]))
    for head, rows in tables:
        shown = Table(*head)
        for column in shown.columns[1:]:
            column.justify = "right"
        for cells, point in zip(rows, plan.points if head is _HEAD else [None] * len(rows), strict=True):
            style = None if point is None else "red" if not point.fits else "bold" if point is plan.chosen else None
            shown.add_row(*cells, style=style)
        console.print(shown)
    if plan.advice:
        console.print(f"advice: {plan.advice}", style="yellow", highlight=False)
    console.print(
        "a forecast, not a measurement:", *(f"  {note}" for note in plan.notes), sep="\n", style="dim", highlight=False
    )
