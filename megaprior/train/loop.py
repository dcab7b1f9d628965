"""The training loop, for every engine. A step: rows, one wait for the device, one decision of all ranks, one update."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from megaprior.errors import Requeue
from megaprior.telemetry import progress
from megaprior.train.instruments import Instruments, Stopwatch
from megaprior.train.optim import clip_scale, learning_rate
from megaprior.train.step import accumulate, announce, total

if TYPE_CHECKING:
    from megaprior.data.loader import Loader
    from megaprior.distributed import Peers
    from megaprior.train.engine import Engine
    from megaprior.train.saving import Saver
    from megaprior.train.settings import RunConfig
    from megaprior.train.signals import StopSignals
    from megaprior.train.watchdog import Watchdog


def run_loop(
    cfg: RunConfig,
    loader: Loader,
    engine: Engine,
    *,
    configuration: str,
    peers: Peers,
    watchdog: Watchdog,
    signals: StopSignals,
    instruments: Instruments,
    evaluate: Callable[[], dict[str, float]],
    saver: Saver,
) -> None:
    """Train from `loader.start_step`, the number of steps done, to `cfg.steps` of them.

    Raises:
        Requeue: a signal came; the checkpoint of that step is written, or begun.
        MegapriorError: the ranks disagree, or a loss or gradient is not finite and no step may be dropped; no rank updated.
    """
    batches, start, log = iter(loader), loader.start_step, instruments.log
    with progress(cfg.steps - start, f"train {cfg.stage}", "steps") as shown:
        for step in range(start + 1, cfg.steps + 1):
            watchdog.beat(f"step {step}")
            instruments.profiler.before(step)
            stopwatch = Stopwatch.start()
            batch = next(batches)
            instruments.own.begin(stopwatch.batch_is_there())
            announced = announce(peers, batch, configuration=configuration)
            groups = accumulate(engine, loader.corpus, batch, seed=cfg.seed, announced=announced)
            instruments.own.launched()
            totals = total(peers, engine, batch, groups, stop=signals.requested, own=instruments.own.values)
            verdict = instruments.guard.judge(step, batch, totals)
            lr = learning_rate(cfg.optim, step, steps=cfg.steps)
            if verdict.skip:
                engine.discard()
            else:
                engine.update(lr=lr, scale=clip_scale(totals.norm, cfg.optim.clip))
            instruments.report(step, batch, totals, verdict=verdict, lr=lr, stopwatch=stopwatch)
            if cfg.eval_every and (step % cfg.eval_every == 0 or step == cfg.steps):
                watchdog.beat(f"the evaluation after step {step}")
                measured = evaluate()
                if log is not None:
                    log.write({"kind": "eval", "step": step, **measured})
            saver.poll()
            if totals.stop or step % cfg.save_every == 0 or step == cfg.steps:
                watchdog.beat(f"the checkpoint after step {step}")
                saver.save(step)
            shown.advance(1, note=f"loss {totals.loss:.4f}")
            if totals.stop and step < cfg.steps:
                name = signals.name or "a signal on another rank"
                raise Requeue(f"{name}: stopped after step {step} with a checkpoint; repeat the command to go on")
