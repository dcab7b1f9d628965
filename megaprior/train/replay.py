"""One step again, on one process: for spikes, resumes and disputes.

A batch is a function of (seed, step), so its samples, D and weights need no run. Its loss and gradient need the weights
before that step: those of the checkpoint one step earlier where there is one, else the newest earlier state that one
process can train on from (of the local engine, or step 0), trained again in memory up to there. Steps that the run dropped
are dropped again, as metrics.jsonl says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megaprior.config import load_config
from megaprior.distributed import Peers, Place
from megaprior.errors import MegapriorError, UsageError
from megaprior.telemetry import say
from megaprior.train import assembly
from megaprior.train.checkpoint import Checkpoint, complete_checkpoints
from megaprior.train.optim import clip_scale, learning_rate
from megaprior.train.record import read_metrics
from megaprior.train.settings import RunConfig
from megaprior.train.step import Totals, accumulate, total


@dataclass(frozen=True)
class Replayed:
    """One step's batch and what the model made of it."""

    step: int
    sample_ids: list[int]
    denominator: int
    totals: Totals


def replay(run: Path, step: int) -> int:
    """Print ids, D, sum of g, loss and gradient norm of update number `step` (1 is the first), and what was logged then.

    Raises:
        UsageError: there is no such step, or no state from which one process can reach it (the possible steps are named).
    """
    found = replay_step(run, step)
    fault = found.totals.fault
    print(f"step {step}: {len(found.sample_ids)} samples, ids {' '.join(map(str, found.sample_ids))}")
    print(
        f"D {found.denominator}, sum of g {found.totals.sum_g:.6f}, dropped {found.totals.dropped}, flat {found.totals.flat}"
    )
    print(f"loss {found.totals.loss:.9f}, gradient norm {found.totals.norm:.9f}")
    if fault is not None:
        print(f"the {fault.what} is not finite")
    logged = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train" and line["step"] == step]
    for line in logged:
        print(f"logged then: loss {line['loss']:.9f}, gradient norm {line['grad_norm']:.9f}")
    return 0


def replay_step(run: Path, step: int) -> Replayed:
    """See `replay`; a loss that is not finite is returned like any other.

    Raises:
        UsageError: as `replay`.
        MegapriorError: a step on the way is not finite here, though the run has updated there.
    """
    if not (run / "config.yaml").is_file():
        raise UsageError(f"{run}: not a run (no config.yaml)")
    recorded = load_config(RunConfig, run / "config.yaml")
    if not 1 <= step <= recorded.steps:
        raise UsageError(f"--step {step}: the run's steps are 1 to {recorded.steps}")
    cfg = replace(recorded, engine="local")
    base = _base(run, recorded, step)
    source = assembly.started_from(cfg, base.model) if base else assembly.resolve_init(cfg)
    tokenizer = assembly.open_tokenizer(source)
    model = assembly.build_model(source, tokenizer)
    start = base.step if base else 0
    loader = assembly.open_loader(cfg, tokenizer, assembly.vision_spec(model), start=start)
    engine = assembly.local_engine(cfg, model, groups=len(loader.sources))
    try:
        if base is not None and recorded.engine == "local":
            base.verify("state")
            engine.load_state(base.state, world=1)
        if start < step - 1:
            say(f"training steps {start + 1} to {step - 1} again, in memory")
        dropped = {line["step"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "skip"}
        for number, batch in zip(range(start + 1, step + 1), loader, strict=False):
            groups = accumulate(engine, loader.corpus, batch, seed=cfg.seed)
            totals = total(Peers(Place()), engine, batch, groups, stop=False)
            if number == step:
                return Replayed(step, batch.sample_ids.tolist(), batch.denominator, totals)
            if number in dropped:
                engine.discard()
                continue
            if totals.fault is not None:
                raise MegapriorError(
                    f"step {number}: the {totals.fault.what} is not finite here; step {step} is out of reach"
                )
            lr = learning_rate(cfg.optim, number, steps=cfg.steps)
            engine.update(lr=lr, scale=clip_scale(totals.norm, cfg.optim.clip))
        raise AssertionError("the loader is endless")
    finally:
        loader.close()


def _base(run: Path, cfg: RunConfig, step: int) -> Checkpoint | None:
    """The checkpoint to begin from; None for the run's very beginning."""
    earlier = [c for c in complete_checkpoints(run) if c.step < step]
    exact = [c for c in earlier if c.step == step - 1]
    if exact:
        return exact[0]
    if cfg.engine == "local":
        return earlier[0] if earlier else None
    if step == 1:
        return None
    possible = ", ".join(str(c.step + 1) for c in reversed(complete_checkpoints(run))) or "none"
    raise UsageError(
        f"--step {step}: this run's optimizer state is spread over its ranks, so one process can replay only the steps that "
        f"follow a checkpoint: 1, {possible}"
    )
