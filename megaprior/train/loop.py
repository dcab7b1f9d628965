"""The training loop, for every engine. A step: rows, one wait for the device, one decision of all ranks, one update."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megaprior.distributed import Peers, Watchdog
from megaprior.errors import Requeue
from megaprior.telemetry import MetricsLog, progress
from megaprior.train.optim import clip_scale, learning_rate
from megaprior.train.step import accumulate, announce, total

if TYPE_CHECKING:
    from megaprior.data.loader import Loader
    from megaprior.train.engine import Engine
    from megaprior.train.settings import RunConfig
    from megaprior.train.signals import StopSignals


def run_loop(
    cfg: RunConfig,
    loader: Loader,
    engine: Engine,
    *,
    configuration: str,
    peers: Peers,
    watchdog: Watchdog,
    signals: StopSignals,
    log: MetricsLog | None,
    evaluate: Callable[[], dict[str, float]],
    save: Callable[[int], Any],
) -> None:
    """Train from `loader.start_step`, the number of updates done, to `cfg.steps` updates; `log` is rank 0's.

    Raises:
        Requeue: a signal came; the checkpoint of that step is written.
        MegapriorError: the ranks disagree, or a loss or gradient is not finite; no rank updated.
    """
    batches, start = iter(loader), loader.start_step
    with progress(cfg.steps - start, f"train {cfg.stage}", "steps") as shown:
        for step in range(start + 1, cfg.steps + 1):
            watchdog.beat(f"step {step}")
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            announced = announce(peers, batch, configuration=configuration)
            groups = accumulate(engine, loader.corpus, batch, seed=cfg.seed, announced=announced)
            totals = total(peers, engine, batch, groups, stop=signals.requested)
            lr = learning_rate(cfg.optim, step, steps=cfg.steps)
            engine.update(lr=lr, scale=clip_scale(totals.norm, cfg.optim.clip))
            seconds = time.perf_counter() - began
            if log is not None and (step % cfg.log_every == 0 or step == cfg.steps):
                times = {"step_s": seconds, "data_wait_s": waited, "loss_tokens_per_s": sum(totals.tokens) / seconds}
                values = {**totals.metrics(batch), "lr": lr, "micro_steps": len(batch.micro), **times}
                log.write({"kind": "train", "step": step, **values})
            if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
                watchdog.beat(f"the evaluation after step {step}")
                measured = evaluate()
                if log is not None:
                    log.write({"kind": "eval", "step": step, **measured})
            if totals.stop or step % cfg.save_every == 0 or step == cfg.steps:
                watchdog.beat(f"the checkpoint after step {step}")
                save(step)
            shown.advance(1, note=f"loss {totals.loss:.4f}")
            if totals.stop and step < cfg.steps:
                name = signals.name or "a signal on another rank"
                raise Requeue(f"{name}: stopped after step {step} with a checkpoint; repeat the command to go on")
