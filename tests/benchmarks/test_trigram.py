"""The trigram that the reference must beat is a proper distribution and learns what it has seen."""

from __future__ import annotations

import math

from benchmarks.trigram import Trigram


def test_probabilities_sum_to_one_after_seen_and_unseen_contexts() -> None:
    model = Trigram([[1, 2, 3, 4], [1, 2, 4, 3], [2, 2, 3, 1], [3, 1, 2, 4]], bos=0, vocabulary=7)
    for context in ([1, 2], [2, 3], [6, 6], [0, 1]):
        total = sum(math.exp(list(model.logprobs([*context, w]))[-1]) for w in range(7))
        assert math.isclose(total, 1.0, rel_tol=1e-12)


def test_a_caption_seen_often_is_likelier_than_its_words_in_another_order() -> None:
    model = Trigram([[1, 2, 3]] * 5 + [[3, 2, 1]], bos=0, vocabulary=5)
    assert sum(model.logprobs([1, 2, 3])) > sum(model.logprobs([2, 1, 3]))
