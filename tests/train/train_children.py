"""What the tests of this room run in processes of their own: a small world of shards, and a trainer that can be killed.

Imported by name (see conftest.py), because a child process has to find it too.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import faults
import numpy as np

from megaprior.config import build_config
from megaprior.data.scores import ScoreWriter
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.shards import Shard
from megaprior.errors import MegapriorError
from megaprior.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megaprior.train.run import RunConfig, train

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}

# Nothing stays whole on a rank: tiny tensors would otherwise not be partitioned at all.
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def make_bases(folder: Path, *, tied: bool = True) -> None:
    """A language model and a vision tower of random weights under `folder`, as transformers writes them."""
    import torch
    from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **SIZES, tie_word_embeddings=tied)).save_pretrained(folder / "lm")
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16, "initializer_factor": 5.0}
    text = {**small, "vocab_size": 300}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "tower")


def hlvlm_settings(world: Path, bases: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """`settings` of an H-LVLM on the models of `make_bases`."""
    model = {"init": str(bases / "lm"), "tower": {"init": str(bases / "tower")}, **changes.pop("model", {})}
    return settings(world, out, stage="hlvlm", model=model, **changes)


def uneven_data(world: Path, folder: Path) -> dict[str, Any]:
    """Data whose steps have from one to several rows, with fewer rows than ranks in some: dummies on one rank."""
    tokenizer = load_tokenizer(world / "tokenizer")
    random = np.random.default_rng(5)
    lengths = [3] * 12 + [60] * 6
    captions = [np.array([*random.integers(7, 240, n), tokenizer.eos_id]) for n in random.permutation(lengths)]
    write_shards(folder / "uneven", captions, tokenizer, images=True)
    text = [np.array([*random.integers(7, 240, 70), tokenizer.eos_id]) for _ in range(9)]
    write_shards(folder / "long", text, tokenizer, images=False)
    return {
        "train": [{"path": str(folder / "uneven")}],
        "text": [{"path": str(folder / "long")}],
        "heldout": str(world / "heldout"),
        "batch_size": 3,
        "max_tokens": 80,
        "pad_to": 16,
        "mix_ratio": 0.6,
    }


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


GOLDEN = Path(__file__).parent / "golden"
GOLDEN_RUNS: dict[str, dict[str, Any]] = {
    "ulvlm_ntp": {"weighting": {"kind": "ntp"}},
    "ulvlm_prior": {"weighting": {"kind": "prior"}},
    "textlm": {"stage": "textlm", "weighting": {"kind": "ntp"}},
}


def golden_settings(world: Path, out: Path, name: str) -> dict[str, Any]:
    """The run whose losses are committed under golden/NAME.json."""
    values = settings(world, out, steps=20, save_every=20, eval_every=10, **GOLDEN_RUNS[name])
    if values["stage"] == "textlm":
        values["data"] |= {"train": values["data"]["text"], "text": [], "heldout": str(world / "text")}
        values["model"] = {"llama": SIZES}
    return values


def measure_golden(world: Path, out: Path, name: str) -> dict[str, Any]:
    """Train it and return its losses."""
    train(config(golden_settings(world, out, name)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    numbers = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "eval")}
    return {
        "loss": [line["loss"] for line in numbers["train"]],
        "grad_norm": [line["grad_norm"] for line in numbers["train"]],
        "heldout_ntp": [line["heldout_ntp"] for line in numbers["eval"]],
    }


def child(values: dict[str, Any], fault: dict[str, Any]) -> None:
    """Train in this process and leave with the exit code; `fault` says what happens to it, for real: see faults.py.

    {"environment": {...}}  the launcher's variables; {"only_rank": r}  the fault is that rank's alone.
    """
    os.environ.update(fault.get("environment", {}))
    rank = int(os.environ.get("RANK", "0"))
    sys.stderr = open(f"{values['out']}.rank{rank}.err", "a", buffering=1)  # noqa: SIM115 (the process ends with it)
    if fault.get("only_rank", rank) == rank:
        faults.cause(fault)
    if "gradients" in fault:
        faults.keep_gradients(Path(fault["gradients"]), first=rank == 0)
    try:
        code = train(config(values))
    except MegapriorError as error:
        print(f"child: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 3
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":  # writes golden/*.json anew: only after a change that is meant to move losses
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        make_world(Path(scratch) / "world")
        for run in GOLDEN_RUNS:
            measured = measure_golden(Path(scratch) / "world", Path(scratch) / run, run)
            GOLDEN.mkdir(exist_ok=True)
            (GOLDEN / f"{run}.json").write_text(json.dumps({"tolerance": 1e-4, **measured}, indent=1) + "\n")
