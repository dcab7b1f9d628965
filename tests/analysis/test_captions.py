from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from megaprior.analysis.captions import caption_views, token_texts
from megaprior.analysis.losses import TokenLosses
from megaprior.data.shards import ShardSet
from megaprior.tokenizer import Tokenizer

CAPTIONS = ["a red square", "Zoë met a 🎉 at dusk", "one", "two blue circles", "three"]


def test_token_texts_spell_the_caption_and_cut_characters_appear_whole(tokenizer: Tokenizer) -> None:
    for caption in [*CAPTIONS, "", "  two  spaces"]:
        ids = [*tokenizer.encode(caption), tokenizer.eos_id]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == caption
        assert texts[-1] == ""
    party = token_texts(tokenizer, tokenizer.encode("🎉"))
    assert [text for text in party if text.strip()] == ["🎉"]
    assert len(party) >= 4  # four bytes, none of them a character


def test_views_are_evenly_spaced_and_carry_every_number(
    tmp_path: Path, write_pairs: Callable[..., Path], made_up_losses: Callable[..., TokenLosses]
) -> None:
    folder = write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4])
    shards = ShardSet.open(folder, scores="ref_logprob")
    losses = {kind: made_up_losses(shards, kind) for kind in ("ntp", "prior")}
    views = caption_views(shards, losses, count=3, tokenizer=shards.tokenizer())
    assert [view["key"] for view in views] == ["key0", "key2", "key4"]
    first, second = views[0]["tokens"][:2]
    # r = -0.1 -> w 0.095; losses 1 and 1.25 of 6; change 0.25 of 1.5
    assert first["style"] == "--w:0.10;--ntp-loss:0.17;--prior-loss:0.21;--change:0.17"
    assert first["tip"] == "w 0.10 · p_ref 0.90 · NTP loss 1.00 · PRIOR loss 1.25 · other word"
    assert first["worse"]
    # r = -2 -> w 0.865; losses 2 and 1.5
    assert second["tip"] == "w 0.86 · p_ref 0.14 · NTP loss 2.00 · PRIOR loss 1.50 · image-related word"
    assert not second["worse"]
    assert views[0]["tokens"][-1]["end"]
    image = Image.open(io.BytesIO(base64.b64decode(views[0]["image"].removeprefix("data:image/png;base64,"))))
    assert image.size == (16, 12)
    assert views[0]["pixelated"]


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
    (view,) = caption_views(shards, {"ntp": part}, count=12, tokenizer=shards.tokenizer())
    assert view["key"] == "key3"
    assert view["tokens"][1]["style"] == "--ntp-loss:0.33"


def test_without_losses_any_captions_are_shown(tmp_path: Path, write_pairs: Callable[..., Path]) -> None:
    shards = ShardSet.open(
        write_pairs(tmp_path / "pairs", CAPTIONS, images=[0, 1, 2, 3, 4], truth=False), scores="ref_logprob"
    )
    views = caption_views(shards, {}, count=2, tokenizer=shards.tokenizer())
    assert [view["key"] for view in views] == ["key0", "key4"]
    assert views[0]["tokens"][0]["tip"] == "w 0.10 · p_ref 0.90"
