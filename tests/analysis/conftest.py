"""Small pairs with known truth, a small U-LVLM, and runs' folders as a finished training leaves them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaprior.analysis.losses import TokenLosses, keep
from megaprior.analysis.report import report
from megaprior.data.scores import ScoreWriter
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.shards import Shard, ShardSet
from megaprior.files import write_manifest
from megaprior.tokenizer import Tokenizer, train_sentencepiece


def picture(seed: int, size: tuple[int, int] = (16, 12)) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """300 ids, bytes for whatever is rare, the vision roles reserved."""
    text = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
    return train_sentencepiece(text, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="session")
def write_pairs(tokenizer: Tokenizer) -> Callable[..., Path]:
    """`write_pairs(folder, captions, images=[0, 0, 1], truth=True, scored=True)`: image i is noise of seed images[i]."""

    def write(
        folder: Path, captions: Sequence[str], *, images: Sequence[int], truth: bool = True, scored: bool = True
    ) -> Path:
        writer = ShardWriter(
            folder, "00000", tokenizer=tokenizer, build_id=folder.name, kind="pairs", source={}, options={}
        )
        lengths = []
        with writer:
            for number, (text, seed) in enumerate(zip(captions, images, strict=True)):
                ids = np.array([*tokenizer.encode(text), tokenizer.eos_id])
                classes = np.arange(len(ids)) % 3
                classes[-1] = 0
                writer.add(
                    f"key{number}",
                    ids,
                    image=picture(seed),
                    image_size=(16, 12),
                    image_key=str(seed),
                    word_class=classes if truth else None,
                )
                lengths.append(len(ids))
            manifest = writer.finish()
        write_build(
            folder, build_id=folder.name, shard_manifests=[manifest], tokenizer=tokenizer, options={}, counts={}
        )
        if scored:
            # image-related tokens (class 1) score lowest; the first token's score is one number, as after BOS
            with ScoreWriter(
                Shard.open(folder, "00000"), "ref_logprob", kind="logprob", scorer={"fingerprint": "f"}
            ) as scores:
                for length in lengths:
                    values = np.array([-0.1, -2.0, -1.0])[np.arange(length) % 3]
                    scores.add(np.append(values[:-1], -0.05))
                scores.finish()
        return folder

    return write


@pytest.fixture(scope="session")
def save_ulvlm(tokenizer: Tokenizer) -> Callable[..., Path]:
    """`save_ulvlm(folder, seed=0)`: two layers of width 32, 4-pixel patches, with its tokenizer."""
    from megaprior.models.lm import ModelConfig
    from megaprior.models.ulvlm import build_ulvlm

    def save(folder: Path, *, seed: int = 0) -> Path:
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        }
        model = build_ulvlm(
            ModelConfig(llama=sizes, patch=4, limit=16),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            roles=tokenizer.reserved_roles(),
            seed=seed,
        )
        model.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer")
        return folder

    return save


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """`write_run(folder, kind="prior", seed=0, heldout=shards)`: a finished run's folder, with made-up held-out losses."""

    def write(folder: Path, *, kind: str = "ntp", seed: int = 0, heldout: ShardSet | None = None) -> Path:
        folder.mkdir(parents=True)
        summary = {
            "trajectory": {"seed": seed, "weighting.kind": kind},
            "train_sources": 1,
            "steps": 40,
            "wall_s": 78.2,
            "peak_memory_mib": 812.4,
            "loss_tokens_per_s": 4321.0,
            "restarts": 0,
            "command": f"megaprior train ulvlm.yaml weighting.kind={kind}",
            "fingerprints": {"model": f"model-{kind}-{seed}"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "latest").write_text("step_00000040\n")
        times = {"step_s": 0.5, "data_wait_s": 0.125, "fill": 0.75}
        lines = [{"kind": "train", "step": s, "loss": 9.0, "ntp_loss": 5 - s / 10, **times} for s in range(1, 41)]
        lines += [
            {
                "kind": "eval",
                "step": s,
                "heldout_ntp": 3.0,
                "heldout_ntp_above": 4.0,
                "heldout_ntp_below": 2.0,
                "threshold": 0.5,
            }
            for s in (20, 40)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
        if heldout is not None:
            keep(
                folder / "analysis" / f"heldout_{heldout.folder.name}.json", made_up(heldout, kind), head(heldout, kind)
            )
        return folder

    return write


@pytest.fixture
def made_up_losses() -> Callable[[ShardSet, str], TokenLosses]:
    """`made_up_losses(shards, "prior")`: the losses that `write_run` keeps."""
    return made_up


HOSTILE = "a red <script>alert('owned')</script> square & more"
CAPTIONS = [
    HOSTILE,
    "a red square",
    "one blue circle at dusk",
    "a photo",
    "2 squares",
    "a photo of 3 red squares at dusk",
]


@pytest.fixture
def captions() -> list[str]:
    """Six captions; the first would run a script in a page that does not escape it."""
    return list(CAPTIONS)


@pytest.fixture
def two_families(tmp_path: Path, write_pairs: Callable[..., Path], write_run: Callable[..., Path]) -> tuple[Path, dict]:
    """A page with everything that a report can show, and its results: two families, a third method, a probe, a tower."""
    pairs = write_pairs(tmp_path / "pairs", CAPTIONS, images=list(range(6)))
    heldout = ShardSet.open(pairs, scores="ref_logprob")
    runs: dict[str, dict[str, list[Path]]] = {"hlvlm": {}, "ulvlm": {}}
    for family, method, seed in (
        *((family, method, seed) for family in runs for method in ("ntp", "prior") for seed in (0, 1)),
        ("hlvlm", "rarity", 0),
    ):
        folder = write_run(tmp_path / f"{family}_{method}_{seed}", kind=method, seed=seed, heldout=heldout)
        runs[family].setdefault(method, []).append(folder)
    interval = {"accuracy": 0.75, "interval": [0.6, 0.86]}
    probe = {"items": 40, **interval, "shuffled_accuracy": 0.5, "shuffled_interval": [0.35, 0.65]}
    probe["by_attribute"] = {"colour": {"items": 40, **interval}}
    lines = [
        {"format": "megaprior.result", "model": "m", "checkpoint": None, "digest": f"digest-{kind}", "probe": probe}
        for kind in ("ntp", "prior")
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tower = write_run(tmp_path / "tower")
    recall = {"r1": 0.5, "r5": 0.75, "r10": 1.0, "median_rank": 1.5}
    record = {"images": 6, "captions": 6, "image_to_text": recall, "text_to_image": recall}
    record |= {
        "chance": {"image_to_text_r1": 1 / 6, "text_to_image_r1": 1 / 6},
        "model_digest": "t",
        "build_id": "pairs",
    }
    record |= {"format": "megaprior.retrieval", "version": 1, "checkpoint": "step_00000040"}
    (tower / "analysis").mkdir()
    write_manifest(tower / "analysis" / "retrieval_pairs.json", record)
    page = tmp_path / "report.html"
    body = report(
        page, shards=[pairs], heldout=pairs, runs=runs, stages={"tower": tower}, probe=tmp_path / "results.jsonl"
    )
    return page, body


def head(heldout: ShardSet, kind: str) -> dict:
    """What `heldout_losses` writes beside the losses."""
    return {"model_digest": f"digest-{kind}", "build_id": heldout.build_id, "checkpoint": "step_00000040"}


def made_up(heldout: ShardSet, kind: str) -> TokenLosses:
    """Losses of 2 nats on related tokens and 1 on others; PRIOR 0.5 better on the former, 0.25 worse on the latter."""
    ids = np.arange(len(heldout))
    counts = heldout.token_counts
    classes = np.concatenate([heldout.word_class(i) for i in ids]) if heldout.has_word_class else None
    related = classes == 1 if classes is not None else np.zeros(counts.sum(), dtype=bool)
    nll = np.where(related, 2.0, 1.0) + (np.where(related, -0.5, 0.25) if kind == "prior" else 0.0)
    r = np.concatenate([heldout.scores(i) for i in ids]).astype(np.float64) if heldout.score_kind else None
    return TokenLosses(
        ids=ids,
        cu=np.concatenate([[0], np.cumsum(counts)]),
        image=ids.copy(),
        nll=nll.astype(np.float32),
        nll_shuffled=(nll + 1).astype(np.float32),
        w=-np.expm1(r) if r is not None else None,
        word_class=classes,
    )
