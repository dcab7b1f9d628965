"""Score streams carried over between folders of two tokenizers: who gets whose scores, what is refused, what a kill leaves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaprior.data.loader import DataConfig, Loader, SourceConfig
from megaprior.data.scores import ScoreWriter
from megaprior.data.shard_writer import ShardWriter, write_build
from megaprior.data.shards import ShardSet, verify
from megaprior.data.vision import PatchSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.data_tools.transfer.run import Request, transfer_scores
from megaprior.data_tools.transfer.shard import Transfer
from megaprior.errors import DataError, UsageError
from megaprior.files import owner_lock
from megaprior.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "A photo of one red square beside 7 dogs.",
    "A café in 東京 at night 👩‍🚀",
    "grey grey grey",
    "two\u2581marks \u2581 of a piece",
    "A photo of one red square beside 7 dogs.",
    "x",
]
SCORER = {"kind": "reference", "fingerprint": "f" * 32}
Caption = tuple[str, str]  # key, text
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer of 330 ids: pieces and a whole other EOS than `tokenizer`'s."""
    import tokenizers

    folder = tmp_path_factory.mktemp("byte_level")
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(TEXTS * 4, vocab_size=330, special_tokens=["<|endoftext|>"], show_progress=False)
    model.save_model(str(folder))
    return load_tokenizer(folder / "vocab.json")


def write(
    folder: Path,
    tokenizer: Tokenizer,
    shards: Sequence[Sequence[Caption]],
    *,
    image: bytes | None = None,
    limit: int = 2048,
    scored: str | None = None,
    kind: str = "logprob",
    windows: bool = False,
) -> Path:
    """A complete folder; `scored` names a stream of scores that follow from the captions' ids."""
    manifests = []
    for number, captions in enumerate(shards):
        head = {"build_id": folder.name, "kind": "text" if image is None else "pairs", "source": {}, "options": {}}
        with ShardWriter(folder, f"{number:05d}", tokenizer=tokenizer, **head) as writer:
            for key, text in captions:
                ids = [*tokenizer.encode(text), tokenizer.eos_id]
                picture = {} if image is None else {"image": image, "image_size": (20, 10), "image_key": "one"}
                writer.add(key, ids[:limit], truncated=len(ids) > limit, end_document=not windows, **picture)
            manifests.append(writer.finish())
    counts: dict[str, int] = {}
    for manifest in manifests:
        counts = {name: counts.get(name, 0) + manifest["counts"][name] for name in manifest["counts"]}
    write_build(folder, build_id=folder.name, shard_manifests=manifests, tokenizer=tokenizer, options={}, counts=counts)
    if scored:
        for shard in ShardSet.open(folder).shards:
            with ScoreWriter(shard, scored, kind=kind, scorer=SCORER, first_token=None) as scores:
                for local in range(len(shard)):
                    ids = shard.streams["tokens"][local]
                    values = np.random.default_rng(ids.astype(np.int64)).exponential(3, len(ids))
                    scores.add(values if kind == "importance" else -values)
                scores.finish()
    return folder


def captions(texts: Sequence[str] = TEXTS, *, first: int = 0) -> list[Caption]:
    return [(f"{first + number:06d}", text) for number, text in enumerate(texts)]


def streams(folder: Path, name: str = "ref_logprob") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"*.{name}.*"))}


def request(source: Path, target: Path, **options: Any) -> Request:
    return Request(source=str(source), target=str(target), **options)


@pytest.fixture
def folders(
    tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer, picture: Callable[..., bytes]
) -> tuple[Path, Path]:
    """Scored text of one tokenizer, pairs of another; the same captions in two shards."""
    both = [captions(), captions(["one more", "and the last"], first=100)]
    source = write(tmp_path / "scored", tokenizer, both, scored="ref_logprob")
    return source, write(tmp_path / "pairs", byte_level, both, image=picture(0))


# ---------------------------------------------------------------- what is written


def test_every_caption_keeps_its_total_and_its_eos(folders: tuple[Path, Path], command: Command) -> None:
    source, target = folders
    code, out, _ = command("transfer-scores", "--from", source, "--to", target)
    assert code == 0
    assert "8 of 8 captions" in out
    given, taken = ShardSet.open(source, scores="ref_logprob"), ShardSet.open(target, scores="ref_logprob")
    for index in range(len(given)):
        one, two = given.scores(index), taken.scores(index)
        unit = float(np.spacing(np.abs(two).max()))
        assert abs(math.fsum(one.tolist()) - math.fsum(two.tolist())) <= unit / 2 * 1.001
        assert two[-1] == pytest.approx(one[-1], rel=1e-6)
        if len(TEXTS) > index and TEXTS[index] == "x":  # one letter and EOS, with the dummy space on one side
            assert two.tolist() == [pytest.approx(one[:-1].sum()), one[-1]]
    assert verify(target) == []


def test_the_manifest_says_whose_scores_these_are(folders: tuple[Path, Path]) -> None:
    source, target = folders
    done = transfer_scores(request(source, target))
    given, taken = ShardSet.open(source, scores="ref_logprob"), ShardSet.open(target, scores="ref_logprob")
    record = json.loads((target / "00000.ref_logprob.json").read_text())
    assert record["tokens_digest"] == taken.shards[0].tokens_digest
    assert record["tokenizer"]["fingerprint"] == taken.fingerprint != given.fingerprint
    assert (record["kind"], record["first_token"]) == ("logprob", None)
    scorer = record["scorer"]
    assert scorer["kind"] == "transfer"
    assert scorer["fingerprint"] == done["scorer"]
    assert scorer["source"]["scorer"] == {"kind": "reference", "fingerprint": "f" * 32}
    assert scorer["source"]["tokenizer"] == given.fingerprint
    assert scorer["source"]["build_id"] == "scored"
    assert scorer["unscored"] == {"missing": 0, "different": 0, "truncated": 0, "unspelled": 0}
    assert str(source.parent) not in json.dumps(record)


def test_other_source_scores_are_another_scorer(folders: tuple[Path, Path], tokenizer: Tokenizer) -> None:
    source, target = folders
    one = transfer_scores(request(source, target))["scorer"]
    for path in source.glob("*.ref_logprob.*"):
        path.unlink()
    for shard in ShardSet.open(source).shards:
        with ScoreWriter(shard, "ref_logprob", kind="logprob", scorer=SCORER) as scores:
            for length in shard.streams["tokens"].lengths:
                scores.add(np.full(length, -1.0))
            scores.finish()
    with pytest.raises(DataError, match=rf"pairs/00000: has scores 'ref_logprob' by transfer {one}"):
        transfer_scores(request(source, target))


def test_the_trainer_takes_them_as_it_takes_a_scorers(folders: tuple[Path, Path]) -> None:
    source, target = folders
    transfer_scores(request(source, target))
    pairs = ShardSet.open(target, scores="ref_logprob")
    loader = Loader(
        DataConfig(train=[SourceConfig(path=str(target))], batch_size=8, max_tokens=512, pad_to=8),
        seed=0,
        weighting=WeightingConfig(kind="prior"),
        spec=PatchSpec(4, 16, 1, 2, 3, 4),
        tokenizer=pairs.tokenizer(),
    )
    batch = loader.batch(0)
    loader.close()
    assert batch.num_loss_tokens == int(pairs.token_counts.sum())
    weight = np.concatenate([row.token_weight.numpy() for row in batch.micro])
    assert batch.sum_g == pytest.approx(batch.num_loss_tokens, rel=1e-5)  # weights average 1 over each caption
    assert weight.std() > 0.05


def test_a_tokenizers_own_shards_get_the_same_bits_whatever_their_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Shards dealt out anew, line numbers as keys in each of them: found by key, told apart by content."""
    texts = [f"{colour} {shape} {n}" for colour in ("red", "blue") for shape in ("square", "star") for n in range(90)]
    halves = [captions(texts[:180]), captions(texts[180:])]
    mixed = [captions(texts)[200:] + halves[1][:20], halves[0][::-1], halves[1][20:180] + captions(texts)[180:200]]
    wanted = [text for shard in mixed for _, text in shard]
    mixed = [[(dict_key(halves, text), text) for _, text in shard] for shard in mixed]
    source = write(tmp_path / "scored", tokenizer, halves, scored="ref_logprob")
    target = write(tmp_path / "again", tokenizer, mixed)
    transfer_scores(request(source, target))
    given, taken = ShardSet.open(source, scores="ref_logprob"), ShardSet.open(target, scores="ref_logprob")
    for index, text in enumerate(wanted):
        assert taken.scores(index).tobytes() == given.scores(texts.index(text)).tobytes()


def dict_key(shards: Sequence[Sequence[Caption]], text: str) -> str:
    return next(key for shard in shards for key, found in shard if found == text)


def test_captions_in_the_same_order_need_no_index_of_keys(
    tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer
) -> None:
    """Some the target lacks, as pairs do whose images were refused, are stepped over."""
    every = captions([f"star {number}" for number in range(300)])
    source = write(tmp_path / "scored", tokenizer, [every], scored="ref_logprob")
    target = write(
        tmp_path / "pairs", byte_level, [[pair for n, pair in enumerate(every) if n % 7 and n not in range(90, 130)]]
    )
    work = Transfer(request(source, target))
    work.shard(0)
    assert not work.source_keys.indexed
    assert len(ShardSet.open(target, scores="ref_logprob")) == len(work.target)


# ---------------------------------------------------------------- captions without scores


def test_a_cut_target_takes_the_scores_of_its_part(tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer) -> None:
    both = [captions()]
    source = write(tmp_path / "scored", tokenizer, both, scored="ref_logprob")
    whole, cut = write(tmp_path / "whole", byte_level, both), write(tmp_path / "cut", byte_level, both, limit=6)
    for target in (whole, cut):
        transfer_scores(request(source, target))
    one, two = ShardSet.open(whole, scores="ref_logprob"), ShardSet.open(cut, scores="ref_logprob")
    assert two.build["counts"]["truncated"] >= 3
    for index in range(len(one)):
        np.testing.assert_allclose(two.scores(index), one.scores(index)[:6], rtol=1e-6)


def unfit(tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer, case: str) -> tuple[Path, Path]:
    good, texts = captions(), [*TEXTS]
    given = good
    limit = 2048
    if case == "missing":
        given = good[:1] + good[2:]
    elif case == "different":
        texts[1] = "A café in 大阪 at night"
    elif case == "truncated":
        limit = 20
    source = write(tmp_path / "scored", tokenizer, [given], limit=limit, scored="ref_logprob")
    return source, write(tmp_path / "pairs", byte_level, [captions(texts)])


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("missing", r"pairs/00000 sample 1 \(key 000001\): the source has no caption of this key"),
        (
            "different",
            r"key 000001\): the caption of this key in scored/00000 sample 1 .* byte 11 on .*大.* normalises",
        ),
        ("truncated", r"key 00000\d\): scored/00000 sample \d .*was cut after \d+ bytes, .*--max-sequence"),
    ],
)
def test_a_caption_without_scores_is_refused_or_weighted_evenly(
    tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer, case: str, told: str
) -> None:
    source, target = unfit(tmp_path, tokenizer, byte_level, case)
    with pytest.raises(DataError, match=told) as error:
        transfer_scores(request(source, target))
    assert "\n" not in str(error.value)
    assert f" {case})" in str(error.value)
    assert "--unscored ntp" in str(error.value)
    assert streams(target) == {}
    done = transfer_scores(request(source, target, unscored="ntp"))
    count = done["unscored"][case]
    assert sum(done["unscored"].values()) == count >= 1
    taken = ShardSet.open(target, scores="ref_logprob")
    lost = [index for index in range(len(taken)) if np.isneginf(taken.scores(index)).all()]
    assert len(lost) == count
    assert sum(np.isneginf(taken.scores(i)).any() for i in range(len(taken))) == count
    assert verify(target) == []
    with pytest.raises(
        DataError, match="left unscored"
    ):  # a later command that lets nothing pass is not told it is done
        transfer_scores(request(source, target))


def test_a_tokenizer_that_normalises_is_refused_where_it_did(
    tmp_path: Path, byte_level: Tokenizer, command: Command
) -> None:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "fine"] * 4), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        normalization_rule_name="nmt_nfkc", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "nfkc.model").write_bytes(model.getvalue())
    nfkc = load_tokenizer(tmp_path / "nfkc.model")
    both = [captions(["plain words", "a ﬁne  day"])]
    source = write(tmp_path / "scored", nfkc, both, scored="ref_logprob")
    target = write(tmp_path / "pairs", byte_level, both)
    code, _, error = command("transfer-scores", "--from", source, "--to", target)
    assert code == 65
    assert "sample 1 (key 000001)" in error
    assert "from byte 2 on" in error
    assert "1 different" in error
    code, out, _ = command("transfer-scores", "--from", source, "--to", target, "--unscored", "ntp")
    assert code == 0
    assert "1 of 2 captions" in out
    assert "1 different" in out


def test_unknown_words_have_no_bytes(tmp_path: Path, byte_level: Tokenizer) -> None:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["plain words are here"] * 8), model_writer=model, model_type="bpe", vocab_size=24,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    (tmp_path / "bare.model").write_bytes(model.getvalue())
    both = [captions(["plain words", "words 東"])]
    source = write(tmp_path / "scored", load_tokenizer(tmp_path / "bare.model"), both, scored="ref_logprob")
    target = write(tmp_path / "pairs", byte_level, both)
    with pytest.raises(DataError, match=r"token \d+ of \d+ in scored/00000 sample 1 .*, id 0, stands for no bytes"):
        transfer_scores(request(source, target))


# ---------------------------------------------------------------- folders and streams that cannot be


def test_importance_has_no_total_to_keep(tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer) -> None:
    source = write(tmp_path / "scored", tokenizer, [captions()], scored="rarity", kind="importance")
    target = write(tmp_path / "pairs", byte_level, [captions()])
    with pytest.raises(UsageError, match="kind importance; only log-probabilities add up"):
        transfer_scores(request(source, target, scores="rarity", name="rarity"))


def test_windows_of_documents_are_refused(tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer) -> None:
    source = write(tmp_path / "scored", tokenizer, [captions()], scored="ref_logprob")
    target = write(tmp_path / "texts", byte_level, [captions()], windows=True)
    with pytest.raises(UsageError, match=r"texts: 1 documents in 6 windows"):
        transfer_scores(request(source, target))


def test_what_is_in_the_way_is_named(folders: tuple[Path, Path], command: Command, tmp_path: Path) -> None:
    source, target = folders
    with pytest.raises(UsageError, match="is a stream of pairs/00000 itself"):
        transfer_scores(request(source, target, name="tokens"))
    with pytest.raises(UsageError, match="--name 'Ref'"):
        transfer_scores(request(source, target, name="Ref"))
    with pytest.raises(UsageError, match="--workers 0"):
        transfer_scores(request(source, target), workers=0)
    with pytest.raises(DataError, match="no scores 'other'"):
        transfer_scores(request(source, target, scores="other"))
    with pytest.raises(DataError, match="has scores 'ref_logprob' by reference"):
        transfer_scores(request(source, source))
    with (
        owner_lock(target, ".score-ref_logprob.lock"),
        pytest.raises(DataError, match=f"in use by .* pid {os.getpid()}"),
    ):
        transfer_scores(request(source, target))
    code, _, error = command("transfer-scores", "--from", tmp_path / "none", "--to", target)
    assert code == 65
    assert "no build.json" in error


# ---------------------------------------------------------------- repeated, killed, beside others


def many(tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer) -> tuple[Path, Path]:
    shards = [
        captions([f"{text} {number}" for text in TEXTS for number in range(40)], first=1000 * n) for n in range(8)
    ]
    source = write(tmp_path / "scored", tokenizer, shards, scored="ref_logprob")
    return source, write(tmp_path / "pairs", byte_level, shards)


def test_killed_and_repeated_with_any_number_of_workers_the_bytes_are_the_same(
    tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer
) -> None:
    source, target = many(tmp_path, tokenizer, byte_level)
    transfer_scores(request(source, target))
    wanted = streams(target)
    assert len(wanted) == 24
    for path in target.glob("*.ref_logprob.*"):
        path.unlink()
    arguments = [sys.executable, "-m", "megaprior.data_tools.cli", "transfer-scores", "--from", source, "--to", target]
    started = subprocess.Popen([*map(str, arguments), "--workers", "2"], stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 60
    while not list(target.glob("*.ref_logprob.json")) and time.monotonic() < give_up:
        time.sleep(0.001)
    started.send_signal(signal.SIGKILL)
    started.wait()
    left = streams(target)
    assert {name: data for name, data in left.items() if name.endswith(".json")}.items() <= wanted.items()
    (target / ".00007.ref_logprob.bin.tmp-elsewhere-1").write_bytes(b"half")
    done = transfer_scores(request(source, target))
    assert streams(target) == wanted
    assert verify(target) == []
    assert not list(target.glob(".*.tmp-*"))
    assert transfer_scores(request(source, target))["done_before"] == 8
    assert 1 <= done["done_before"] < 9
    assert streams(target) == wanted


def test_workers_tell_what_they_refuse(tmp_path: Path, tokenizer: Tokenizer, byte_level: Tokenizer) -> None:
    source = write(tmp_path / "scored", tokenizer, [captions(), captions(first=50)], scored="ref_logprob")
    target = write(tmp_path / "pairs", byte_level, [captions(), captions(first=60)])
    with pytest.raises(DataError, match=r"pairs/00001 sample 0 \(key 000060\)|pairs/00001 .* no caption of this key"):
        transfer_scores(request(source, target), workers=2)
    assert {name.partition(".")[0] for name in streams(target)} == {"00000"}
