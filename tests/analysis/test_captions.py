from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megaprior.analysis.captions import caption_views, ranks
from megaprior.analysis.losses import TokenLosses
from megaprior.data.shards import ShardSet

CAPTIONS = ["a red square", "Zoë met a 🎉 at dusk", "one", "two blue circles", "three"]


def test_views_are_evenly_spaced_and_carry_every_number(
    tmp_path: Path, write_pairs: Callable[..., Path], made_up_losses: Callable[..., TokenLosses]
) -> None:
    folder = write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4])
    shards = ShardSet.open(folder, scores="ref_logprob")
    losses = {"ulvlm": {kind: made_up_losses(shards, kind) for kind in ("ntp", "prior")}}
    views = caption_views(shards, losses, count=3, tokenizer=shards.tokenizer())
    assert [view["key"] for view in views] == ["key0", "key2", "key4"]
    first, second = views[0]["tokens"][:2]
    # r = -0.1 -> w 0.095; losses 1 and 1.25 of 6; change 0.25 of 1.5
    assert first["style"] == "--w:0.10;--ulvlm-ntp:0.17;--ulvlm-prior:0.21;--ulvlm-change:0.17"
    # g = k w / sum(w), as the losses of training are weighted
    w = -np.expm1(shards.scores(0).astype(np.float64))
    g = len(w) * w / w.sum()
    assert first["g"] == pytest.approx(g[0])
    assert first["tip"] == f"w 0.10 · p_ref 0.90 · g {g[0]:.2f} · NTP loss 1.00 · PRIOR loss 1.25 · other word"
    assert first["worse"] == ["ulvlm"]
    # r = -2 -> w 0.865; losses 2 and 1.5
    assert second["tip"].startswith("w 0.86 · p_ref 0.14 · g ")
    assert second["tip"].endswith(" · NTP loss 2.00 · PRIOR loss 1.50 · image-related word")
    assert second["worse"] == []
    assert (second["losses"], second["changes"]) == ({"ulvlm": {"ntp": 2.0, "prior": 1.5}}, {"ulvlm": -0.5})
    assert views[0]["tokens"][-1]["end"]
    image = Image.open(io.BytesIO(base64.b64decode(views[0]["image"].removeprefix("data:image/png;base64,"))))
    assert image.size == (16, 12)
    assert views[0]["pixelated"]
    assert views[0]["alt"] == "Picture with the caption: a red square"


def test_losses_of_a_part_of_the_captions_choose_among_those(
    tmp_path: Path, write_pairs: Callable[..., Path], made_up_losses: Callable[..., TokenLosses]
) -> None:
    shards = ShardSet.open(write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4], scored=False))
    whole = made_up_losses(shards, "ntp")
    part = TokenLosses(
        ids=np.array([3]),
        cu=np.array([0, shards.token_counts[3]]),
        image=np.array([0]),
        nll=whole.nll[whole.cu[3] : whole.cu[4]],
        nll_shuffled=None,
        w=None,
        word_class=None,
    )
    (view,) = caption_views(shards, {"ulvlm": {"ntp": part}}, count=12, tokenizer=shards.tokenizer())
    assert view["key"] == "key3"
    assert view["tokens"][1]["style"] == "--ulvlm-ntp:0.33"


def test_without_losses_any_captions_are_shown(tmp_path: Path, write_pairs: Callable[..., Path]) -> None:
    shards = ShardSet.open(
        write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4], truth=False), scores="ref_logprob"
    )
    views = caption_views(shards, {}, count=2, tokenizer=shards.tokenizer())
    assert [view["key"] for view in views] == ["key0", "key4"]
    assert views[0]["tokens"][0]["tip"].startswith("w 0.10 · p_ref 0.90 · g ")
    assert views[0]["changes"] == {}
    assert views[0]["style"] == ""


def test_two_families_stand_side_by_side_in_one_tip(
    tmp_path: Path, write_pairs: Callable[..., Path], made_up_losses: Callable[..., TokenLosses]
) -> None:
    shards = ShardSet.open(write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4]), scores="ref_logprob")
    ntp, prior = (made_up_losses(shards, kind) for kind in ("ntp", "prior"))
    losses = {"ulvlm": {"ntp": ntp, "prior": prior}, "hlvlm": {"prior": prior, "rarity": ntp}}
    first = caption_views(shards, losses, count=1, tokenizer=shards.tokenizer())[0]["tokens"][0]
    assert first["tip"].endswith(
        " · U-LVLM loss: NTP 1.00, PRIOR 1.25 · H-LVLM loss: PRIOR 1.25, rarity 1.00 · other word"
    )
    assert first["changes"] == {"ulvlm": 0.25, "hlvlm": -0.25}  # without NTP: the second method minus the first
    assert first["worse"] == ["ulvlm"]


def test_ranks_sort_by_size_by_gain_and_by_loss_and_keep_ties_in_order() -> None:
    changes = [
        {"u": {"size": 0.5, "mean": 0.1}},
        {"u": {"size": 0.2, "mean": -0.2}},
        {},  # this caption was not measured
        {"u": {"size": 0.9, "mean": 0.1}},
    ]
    places = ranks(changes)
    assert [place["u-changed"] for place in places] == [1, 2, 3, 0]
    assert [place["u-better"] for place in places] == [1, 0, 3, 2]
    assert [place["u-worse"] for place in places] == [0, 2, 3, 1]


def test_an_importance_stream_has_no_p_ref(
    tmp_path: Path, write_pairs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet.open(write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4]), scores="ref_logprob")
    monkeypatch.setattr(shards, "score_kind", "importance")
    monkeypatch.setattr(shards, "scores", lambda index: np.full(len(shards.tokens(index)), 0.25, np.float32))
    first = caption_views(shards, {}, count=1, tokenizer=shards.tokenizer())[0]["tokens"][0]
    assert first["tip"] == "w 0.25 · g 1.00 · other word"
