from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from megaprior.data.shards import ShardSet
from megaprior.score.worker import Job, Reference, pack_rows, plan


def job(reference: Path, shards: Path, *, row_tokens: int = 256, dtype: str = "float32") -> Job:
    return Job(str(reference), str(shards), "ref_logprob", row_tokens, 512, dtype, 1)


def test_rows_are_filled_longest_first_and_ties_keep_their_order() -> None:
    rows = [row.tolist() for row in pack_rows(np.array([3, 5, 3, 1, 4]), 8)]
    assert rows == [[1], [4, 0], [2, 3]]  # 5 (+4 > 8); 4 + 3 (+3 > 8); 3 + 1
    assert [row.tolist() for row in pack_rows(np.array([8, 8]), 8)] == [[0], [1]]


def test_scores_are_those_of_each_caption_alone_after_bos(reference: Path, write_captions: Callable[..., Path]) -> None:
    """r_i = log p(t_i | BOS, t_1..t_{i-1}) by transformers' own model in float64, one caption at a time."""
    folder = write_captions("pairs", captions=40)
    shards = ShardSet.open(folder)
    tokenizer = shards.tokenizer()
    scorer = Reference(job(reference, folder), tokenizer)
    units = [unit for units in plan(shards, 512).values() for unit in units]
    found = np.concatenate([scorer.unit(shards, unit) for unit in units])

    oracle = LlamaForCausalLM.from_pretrained(reference, dtype=torch.float64)
    expected = []
    for i in range(len(shards)):
        ids = torch.tensor([tokenizer.bos_id, *shards.tokens(i).tolist()])
        with torch.no_grad():
            logits = oracle(ids[None, :-1]).logits[0]
        expected.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy())
    # worst seen 5e-6, with scores from -2.8 to -9.8
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-5)


def test_neighbours_in_a_row_change_scores_by_rounding_only(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", captions=60, shards=1)
    shards = ShardSet.open(folder)
    packed, alone = (
        Reference(job(reference, folder, row_tokens=row_tokens), shards.tokenizer()) for row_tokens in (2048, 41)
    )
    for unit in plan(shards, 512)["00000"]:
        np.testing.assert_allclose(packed.unit(shards, unit), alone.unit(shards, unit), rtol=0, atol=1e-5)


def test_in_bfloat16_neighbours_change_no_more_than_its_own_rounding_does(
    reference: Path, write_captions: Callable[..., Path]
) -> None:
    folder = write_captions("pairs", captions=60, shards=1)
    shards = ShardSet.open(folder)
    exact, packed, alone = (
        Reference(job(reference, folder, row_tokens=row_tokens, dtype=dtype), shards.tokenizer())
        for row_tokens, dtype in ((2048, "float32"), (2048, "bfloat16"), (41, "bfloat16"))
    )
    for unit in plan(shards, 512)["00000"]:
        true, one, other = (scorer.unit(shards, unit) for scorer in (exact, packed, alone))
        # measured: neighbours 0.02, bfloat16 against float32 0.06 to 0.09, of scores from -2.8 to -9.8
        assert np.abs(one - other).max() <= 0.05
        assert np.abs(one - other).max() <= np.abs(one - true).max() <= 0.25
