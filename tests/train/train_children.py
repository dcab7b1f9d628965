"""What the tests of this room run in processes of their own: a small world of shards, and a trainer that can be killed.

Imported by name (see conftest.py), because a child process has to find it too.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megaprior.config import build_config
from megaprior.data.scores import ScoreWriter
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.shards import Shard
from megaprior.errors import MegapriorError
from megaprior.tokenizer import Tokenizer, train_sentencepiece
from megaprior.train import engine as engine_module
from megaprior.train.run import RunConfig, train

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


def make_world(folder: Path) -> None:
    """`pairs` (40, with scores), `heldout` (12, with scores) and `text` (30) under `folder`, tiny, the same every time."""
    texts = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
    tokenizer = train_sentencepiece(texts, folder / "tokenizer", vocab_size=300)
    random = np.random.default_rng(7)
    for name, count in (("pairs", 40), ("heldout", 12), ("text", 30)):
        captions = []
        for _ in range(count):
            template = 7 + random.integers(0, 6) * 40
            words = template + np.arange(random.integers(2, 11)) * 3 + random.integers(0, 2)
            captions.append(np.array([*words, tokenizer.eos_id]))
        write_shards(folder / name, captions, tokenizer, images=name != "text")


def write_shards(folder: Path, captions: list[np.ndarray], tokenizer: Tokenizer, *, images: bool) -> None:
    """One shard of these captions; pairs get pictures of two shapes and made-up log-probabilities."""
    folder.mkdir(parents=True)
    kind, size = "pairs" if images else "text", ((32, 32), (32, 16))
    common = {"tokenizer": tokenizer, "build_id": folder.name, "kind": kind}
    with ShardWriter(folder, "00000", **common, source={}, options={}) as writer:
        for i, tokens in enumerate(captions):
            shape = size[i % 2]
            picture = {"image": png(shape, i), "image_size": shape} if images else {}
            writer.add(f"key{i}", tokens, **picture)
        manifest = writer.finish()
    if images:
        with ScoreWriter(
            Shard.open(folder, "00000"), "ref_logprob", kind="logprob", scorer={"fingerprint": "made up"}
        ) as scores:
            for tokens in captions:
                before = np.concatenate([[0], tokens[:-1]])
                scores.add(-((tokens * 37 + before * 11) % 50).astype(np.float32) / 10)
            scores.finish()
    write_build(folder, build_id=folder.name, shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={})


def png(size: tuple[int, int], seed: int) -> bytes:
    """A picture of noise, the same for the same seed."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run's configuration as plain values: rows of 96 tokens, so that a step has several."""
    values: dict[str, Any] = {
        "stage": "ulvlm",
        "out": str(out),
        "seed": 3,
        "steps": 6,
        "save_every": 3,
        "model": {"llama": SIZES, "patch": 16, "limit": 32},
        "data": {
            "train": [{"path": str(world / "pairs")}],
            "text": [{"path": str(world / "text")}],
            "heldout": str(world / "heldout"),
            "batch_size": 8,
            "max_tokens": 96,
            "pad_to": 32,
            "mix_ratio": 0.5,
        },
        "weighting": {"kind": "prior"},
        "optim": {"lr": 3e-3, "warmup_steps": 2},
    }
    return {**values, **changes}


def config(values: dict[str, Any]) -> RunConfig:
    """The configuration that `settings` describes."""
    return build_config(RunConfig, values, source="test")


def child(values: dict[str, Any], fault: dict[str, Any]) -> None:
    """Train in this process and leave with the exit code; `fault` says where to be killed, for real.

    {"rows": n}  SIGKILL when the n-th row's forward begins;
    {"files": n, "below": text}  SIGKILL at the n-th opening, renaming or removal of a file whose path holds `text`;
    {"signal": name, "rows": n}  that signal instead, the process lives on.
    """
    if "rows" in fault:
        _at_row(fault["rows"], getattr(signal, fault.get("signal", "SIGKILL")))
    if "files" in fault:
        _at_file(fault["files"], fault["below"])
    try:
        code = train(config(values))
    except MegapriorError as error:
        print(f"child: {error}", file=sys.stderr)
        code = error.exit_code
    sys.stderr.flush()
    os._exit(code)


def _at_row(number: int, what: signal.Signals) -> None:
    original, seen = engine_module.LocalEngine.accumulate, [0]

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        seen[0] += 1
        if seen[0] == number:
            os.kill(os.getpid(), what)
        original(self, *args, **kwargs)

    engine_module.LocalEngine.accumulate = counted  # type: ignore[method-assign]


def _at_file(number: int, below: str) -> None:
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and below in str(arguments[0]):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
