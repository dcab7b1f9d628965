"""Real ranks that stay: one pool of processes per number of ranks, which run one case after another.

Importing torch, transformers and DeepSpeed and meeting each other costs a process ten times what a tiny case costs. A case is a
configuration; it forms its own model, loader and engine, and what it leaves behind is destroyed before the next. Imported by
name (see conftest.py), because the ranks have to find it too.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from train_children import config, free_port

from megaprior.distributed import Peers, Place, connect
from megaprior.train import assembly
from megaprior.train.evaluation import HeldOut
from megaprior.train.optim import clip_scale, learning_rate
from megaprior.train.step import accumulate, total
from megaprior.train.zero3 import Zero3Engine

_PATIENCE_S = 150.0


@dataclass(frozen=True)
class Case:
    """What the ranks are to do: steps [start, stop) of the run `values`, from and to a checkpoint's state where asked.

    Attributes:
        load: (folder, number of ranks that wrote it).
        save: folder to write the state to in the end.
        discard: steps whose gradients are dropped in place of an update.
        environment: variables for this case alone.
        device_name: what DeepSpeed takes the accelerator's name for: with "cpu:0" the part of a partial offload that stays on the
            device is told from the one in host memory, as on a GPU.
    """

    values: dict[str, Any]
    start: int = 0
    stop: int = 20
    load: tuple[Path, int] | None = None
    save: Path | None = None
    discard: tuple[int, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    device_name: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a case came to, the same on all ranks except `rows`.

    Attributes:
        gradients: of the first step, summed over ranks, before clipping.
        losses, norms: by step.
        weights: in the end.
        heldout: of an evaluation in the end, where the configuration asks for any.
        rows: by rank, by step, for each row (loss tokens, patches).
    """

    gradients: dict[str, torch.Tensor]
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    heldout: dict[str, float]
    rows: list[list[list[tuple[int, int]]]]


def run_case(case: Case, peers: Peers) -> Outcome:
    """Train as the loop does, on this rank."""
    cfg = config(case.values)
    source = assembly.resolve_init(cfg)
    tokenizer = assembly.open_tokenizer(source)
    model = assembly.build_model(source, tokenizer)
    spec, here = assembly.vision_spec(model), peers.place
    loader = assembly.open_loader(source, tokenizer, spec, rank=here.rank, world=here.world)
    universal = case.load is not None and case.load[1] != here.world
    engine = assembly.build_engine(source, model, peers=peers, groups=len(loader.sources), universal=universal)
    if case.load is not None:
        engine.load_state(case.load[0], world=case.load[1])
    gradients: dict[str, torch.Tensor] = {}
    losses, norms, rows = [], [], []
    for step in range(case.start, case.stop):
        batch = loader.batch(step)
        rows.append([(len(row.targets), len(row.patches)) for row in batch.micro])
        groups = accumulate(engine, loader.corpus, batch, seed=cfg.seed)
        totals = total(peers, engine, batch, groups, stop=False)
        losses.append(totals.loss)
        norms.append(totals.norm)
        if step == case.start:
            gradients = {name: tensor.clone() for name, tensor in engine.gradients()}
        if step in case.discard:
            engine.discard()
            continue
        rate = learning_rate(cfg.optim, step + 1, steps=cfg.steps)
        engine.update(lr=rate, scale=clip_scale(totals.norm, cfg.optim.clip))
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    heldout = _evaluate(cfg, spec, tokenizer, peers, engine) if cfg.eval_every else {}
    if case.save is not None:
        peers.first_does(lambda: case.save.mkdir(parents=True) if case.save else None)
        engine.save_state(case.save)
        peers.settle()
    loader.close()
    if isinstance(engine, Zero3Engine):
        engine.close()
    return Outcome(gradients, losses, norms, weights, heldout, peers.gather_objects(rows))


def run_locally(case: Case) -> Outcome:
    """The same by the plain engine, in this process: the oracle."""
    return run_case(case, Peers(Place()))


def _evaluate(cfg: Any, spec: Any, tokenizer: Any, peers: Peers, engine: Any) -> dict[str, float]:
    samples = cfg.eval_batches * cfg.data.batch_size
    held = HeldOut(cfg.data, spec=spec, tokenizer=tokenizer, peers=peers, samples=samples, threshold=cfg.eval_threshold)
    return held.measure(engine)


class RankPool:
    """`world` processes that formed one group; `run` gives rank 0's outcome of a case."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, case: Case) -> Outcome:
        """All ranks run `case`; an error or silence on any ends them all (the next case starts new ones).

        Raises:
            AssertionError: with the traceback of the first rank that failed, or the ranks that hang.
        """
        if not self._ranks:
            self._start()
        for _, pipe in self._ranks:
            pipe.send(case)
        answers: dict[int, Any] = {}
        ends, until = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks)}, time.monotonic() + _PATIENCE_S
        while len(answers) < self.world:
            ready = wait([pipe for pipe, rank in ends.items() if rank not in answers], until - time.monotonic())
            for pipe in ready:
                rank = ends[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = f"rank {rank} ended"
            failed = [answer for answer in answers.values() if isinstance(answer, str)]
            if failed or not ready:
                self.close()
                silent = [rank for rank in range(self.world) if rank not in answers]
                raise AssertionError(failed[0] if failed else f"ranks {silent} hang")
        return answers[0]

    def close(self) -> None:
        """End the ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        context, port = multiprocessing.get_context("forkserver"), free_port()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    """One rank: cases in, outcomes (or a traceback) out, until the other end is gone."""
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": world}
    os.environ.update(
        {**{name: str(value) for name, value in shared.items()}, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    )
    torch.set_num_threads(1)
    peers = connect(Place(rank, world, rank), backend="gloo", timeout_s=_PATIENCE_S)
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            return
        try:
            with _as_asked(case):
                outcome = run_case(case, peers)
            answer = outcome if rank == 0 else None
        except BaseException:
            answer = f"rank {rank}:\n{traceback.format_exc()}"
        gc.collect()
        pipe.send_bytes(pickle.dumps(answer))  # by value: the pipe's own way would share the tensors' memory


@contextmanager
def _as_asked(case: Case) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in case.environment}
    os.environ.update(case.environment)
    device: Any = None
    if case.device_name is not None:
        from deepspeed.accelerator import get_accelerator

        device = get_accelerator()
        name, device._name = device._name, case.device_name
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
        if device is not None:
            device._name = name
