"""One training run from its configuration: start or resume, train, leave a record.

RUN/config.yaml    the resolved configuration        RUN/metrics.jsonl   one line per logged step and evaluation
RUN/checkpoints/   see checkpoint.py                 RUN/summary.json    time, memory, fingerprints, command
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch

from megaprior.config import dump_config
from megaprior.distributed import Peers, connect, digest, place
from megaprior.models.clip import Clip
from megaprior.telemetry import MetricsLog, say
from megaprior.trackers import open_trackers
from megaprior.train import assembly
from megaprior.train.checkpoint import Checkpoint
from megaprior.train.evaluation import HeldOut
from megaprior.train.guards import Guard
from megaprior.train.instruments import Instruments
from megaprior.train.loop import run_loop
from megaprior.train.pairs import contrast_notes
from megaprior.train.plan import describe_plan
from megaprior.train.preflight import preflight, wants_preflight
from megaprior.train.record import (
    Record,
    has_summary,
    refuse_other_versions,
    set_threads,
    truncate_metrics,
    write_summary,
)
from megaprior.train.replay import replay
from megaprior.train.resume import claim, restore
from megaprior.train.saving import Saver
from megaprior.train.settings import RunConfig, agreed_digest, check_run
from megaprior.train.signals import StopSignals
from megaprior.train.watchdog import Watchdog

__all__ = ["RunConfig", "replay", "train"]


def train(cfg: RunConfig, *, dry_run: bool = False, signals: StopSignals | None = None) -> int:
    """Run a configuration to its end, from its newest complete checkpoint if it has one. Returns the exit code 0.

    `signals` may be installed earlier, so that a signal during the imports is not lost.

    Raises:
        UsageError: the configuration or the launcher's environment is wrong, or `out` holds another run.
        DataError: shards, scores, starting model or a checkpoint are refused.
        Requeue: SIGTERM or SIGUSR1 came; a checkpoint is written (exit code 75).
        MegapriorError: ranks disagree, or a loss or gradient is not finite; nothing was updated.
    """
    here = place()
    check_run(cfg, world=here.world)
    if dry_run:
        print(describe_plan(assembly.resolve_init(cfg), world=here.world))
        return 0
    if cfg.engine == "zero3":
        from megaprior.train.zero3 import check_version

        check_version()
    with ExitStack() as stack:
        if signals is None:
            signals = stack.enter_context(StopSignals())
        set_threads(int(os.environ.get("LOCAL_WORLD_SIZE", here.world)))
        if torch.cuda.is_available():
            torch.cuda.set_device(here.local_rank)
        else:  # transformers imports DeepSpeed when it saves, which otherwise looks for a GPU and says that there is none
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        peers = connect(here, backend="nccl" if torch.cuda.is_available() else "gloo", timeout_s=cfg.timeout_s)
        stack.callback(peers.close)
        watchdog = stack.enter_context(Watchdog(peers, timeout_s=cfg.timeout_s))
        refuse_other_versions(peers)
        peers.announce({"its configuration": digest(agreed_digest(cfg))}).check(0)
        resumed = claim(cfg, peers, stack)
        watchdog.stacks = cfg.out / "stacks"
        if resumed is not None and resumed.step >= cfg.steps:
            say(f"{cfg.out}: all {cfg.steps} steps are done; nothing to do")
            if here.rank == 0 and not has_summary(cfg, resumed):
                write_summary(cfg, resumed)
            return 0
        _train(cfg, resumed, peers=peers, watchdog=watchdog, signals=signals, stack=stack)
    return 0


def _train(
    cfg: RunConfig,
    resumed: Checkpoint | None,
    *,
    peers: Peers,
    watchdog: Watchdog,
    signals: StopSignals,
    stack: ExitStack,
) -> None:
    here = peers.place
    source = (
        assembly.started_from(cfg, resumed.model) if resumed else peers.first_does(lambda: assembly.resolve_init(cfg))
    )
    tokenizer = assembly.open_tokenizer(source)
    model = assembly.build_model(source, tokenizer)
    spec, start = assembly.vision_spec(model), resumed.step if resumed else 0
    loader = assembly.open_loader(cfg, tokenizer, spec, rank=here.rank, world=here.world, start=start)
    stack.callback(loader.close)
    if isinstance(model, Clip) and here.rank == 0:
        for note in contrast_notes(loader, positions=model.positions, world=here.world):
            say(note)
    universal = resumed is not None and resumed.manifest["world"] != here.world
    engine = assembly.build_engine(cfg, model, peers=peers, groups=len(loader.sources), universal=universal)
    if resumed is not None:
        restore(resumed, cfg=cfg, engine=engine, loader=loader, peers=peers)
    heldout = None
    if cfg.eval_every:
        samples = cfg.eval_batches * cfg.data.batch_size
        heldout = HeldOut(
            cfg.data, spec=spec, tokenizer=tokenizer, peers=peers, samples=samples, threshold=cfg.eval_threshold
        )
    if wants_preflight(cfg):
        watchdog.beat("the preflight")
        preflight(engine, loader, cfg=cfg, bos_id=tokenizer.bos_id, fresh=resumed is None)
    guard = Guard(cfg.guards, resumed.manifest.get("guards") if resumed else None)
    record = Record(cfg, tokenizer, loader, guard=guard, resumed=resumed)
    log = _metrics(cfg, start, stack) if here.rank == 0 else None
    instruments = Instruments.of(cfg, engine, guard=guard, log=log)
    stack.callback(instruments.profiler.close)
    evaluate = (lambda: heldout.measure(engine)) if heldout is not None else dict
    saver = stack.enter_context(
        Saver(
            cfg.out,
            engine=engine,
            peers=peers,
            tokenizer=tokenizer,
            facts=record.facts,
            log=log,
            background=cfg.save_background,
            keep_last=cfg.keep_last,
            keep_every=cfg.keep_every,
            timeout_s=cfg.timeout_s,
            frozen=resumed.manifest.get("frozen") if resumed else None,
        )
    )
    run_loop(
        cfg,
        loader,
        engine,
        configuration=agreed_digest(cfg),
        peers=peers,
        watchdog=watchdog,
        signals=signals,
        instruments=instruments,
        evaluate=evaluate,
        saver=saver,
    )
    saver.finish()
    if here.rank == 0:
        assert saver.last is not None, "the last step is saved"
        write_summary(cfg, saver.last)


def _metrics(cfg: RunConfig, step: int, stack: ExitStack) -> MetricsLog:
    truncate_metrics(cfg.out / "metrics.jsonl", step)
    log = MetricsLog(cfg.out, open_trackers(cfg.tracker, cfg.out, start=step, config=dump_config(cfg)))
    stack.callback(log.close)
    return log
