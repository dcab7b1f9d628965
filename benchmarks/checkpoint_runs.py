"""The small runs that checkpoint.py and checkpoint_kills.py train, and how their ranks are started.

A text LM on made-up documents under DeepSpeed ZeRO-3. Ranks come from a server process that has imported everything once.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = multiprocessing.get_context("forkserver")
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BASE_100M = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}


def make_shards(folder: Path, *, documents: int = 64) -> Path:
    """One shard of random documents of 20 to 60 tokens, the same every time."""
    from megaprior.data.shard_writer import ShardWriter, write_build
    from megaprior.tokenizer import train_sentencepiece

    texts = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
    tokenizer = train_sentencepiece(texts, folder / "tokenizer", vocab_size=300)
    random, target = np.random.default_rng(7), folder / "text"
    target.mkdir()
    common = {"tokenizer": tokenizer, "build_id": "checkpoint", "kind": "text"}
    with ShardWriter(target, "00000", **common, source={}, options={}) as writer:
        for i in range(documents):
            tokens = random.integers(7, 240, random.integers(20, 60))
            writer.add(f"key{i}", np.array([*tokens, tokenizer.eos_id]))
        manifest = writer.finish()
    write_build(target, build_id="checkpoint", shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={})
    return target


def settings(shards: Path, out: Path, *, llama: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run's configuration as plain values; nothing of it stays whole on a rank."""
    return {
        "stage": "textlm",
        "out": str(out),
        "engine": "zero3",
        "zero": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        "model": {"llama": llama},
        "data": {"train": [{"path": str(shards)}], "batch_size": 4, "max_tokens": 96, "pad_to": 32},
        "optim": {"lr": 3e-4, "schedule": "constant"},
        "timeout_s": 120.0,
        **changes,
    }


def start(values: dict[str, Any], *, world: int, operation: dict[int, int] | None = None) -> list[Any]:
    """Processes of the ranks of a run. `operation` kills that rank at its n-th operation on a file of a checkpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    CONTEXT.set_forkserver_preload(["benchmarks.checkpoint_runs", "megaprior.train.run", "deepspeed"])
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    processes = []
    for rank in range(world):
        launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": port}
        arguments = (values, {**launcher, "MASTER_ADDR": "127.0.0.1"}, (operation or {}).get(rank))
        processes.append(CONTEXT.Process(target=_rank, args=arguments))
        processes[-1].start()
    return processes


def _rank(values: dict[str, Any], launcher: dict[str, str], operation: int | None) -> None:
    """One rank in this process; what it says goes to OUT.rankN.err, and it leaves with the run's exit code."""
    os.environ.update(launcher)
    sys.stderr = open(f"{values['out']}.rank{launcher['RANK']}.err", "a", buffering=1)  # noqa: SIM115 (open until the end)
    from megaprior.config import build_config
    from megaprior.errors import MegapriorError
    from megaprior.train.run import RunConfig, train

    if operation is not None:
        _kill_at(operation)
    try:
        code = train(build_config(RunConfig, values, source="benchmark"))
    except MegapriorError as error:
        print(f"rank {launcher['RANK']}: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 3
    sys.stderr.flush()
    os._exit(code)


def _kill_at(number: int) -> None:
    """SIGKILL this process when a file below checkpoints/, or `latest`, is opened, renamed or removed for the n-th time."""
    import signal

    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            path = str(arguments[0])
            if "/checkpoints/" in path or "latest" in path:
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
