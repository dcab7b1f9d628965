"""Retrieval, counted by hand, and as the command reports it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megaprior.retrieval import describe, first_right, scores


def test_ranks_count_what_stands_before_the_first_right_one():
    products = np.array([[0.9, 0.8, 0.7], [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]])
    right = np.array([[True, False, False], [True, True, False], [False, True, False]])
    assert first_right(products, right).tolist() == [1, 2, 2]  # the last: two wrong ones, equal, count half each


def test_shares_of_a_matrix_made_by_hand():
    """Three images, five captions: 0, 1 of image 0; 2, 3 of image 1; 4 of image 2, in the words of caption 1."""
    products = np.array(
        [
            [0.9, 0.1, 0.2, 0.3, 0.0],
            [0.8, 0.7, 0.6, 0.1, 0.4],
            [0.7, 0.2, 0.5, 0.9, 0.8],
        ]
    )
    found = scores(products, image_of=np.array([0, 0, 1, 1, 2]), text_of=np.array([0, 1, 2, 3, 1]))
    # Captions: 0 finds image 0; 1 belongs to images 0 and 2 but finds 1; 2 finds 1; 3 has its image last; 4 finds 2.
    assert found["text_to_image"] == {"r1": 3 / 5, "r5": 1.0, "r10": 1.0, "median_rank": 1.0}
    # Images: 0 finds its own; 1 has 2 in third place; 2 finds 4 (or 1, of the same words) behind 3.
    assert found["image_to_text"] == {"r1": 1 / 3, "r5": 1.0, "r10": 1.0, "median_rank": 2.0}
    assert found["chance"]["text_to_image_r1"] == pytest.approx((1 / 3 + 2 / 3 + 1 / 3 + 1 / 3 + 2 / 3) / 5)
    assert found["chance"]["image_to_text_r1"] == pytest.approx((3 / 5 + 2 / 5 + 2 / 5) / 3)
    assert (found["images"], found["captions"]) == (3, 5)


def test_random_order_gives_chance():
    random = np.random.default_rng(0)
    image_of = np.repeat(np.arange(40), 5)
    found = [scores(random.random((40, 200)), image_of=image_of, text_of=np.arange(200)) for _ in range(200)]
    for way in ("text_to_image", "image_to_text"):
        mean = np.mean([f[way]["r1"] for f in found])
        assert mean == pytest.approx(found[0]["chance"][f"{way}_r1"], abs=0.003)  # 0.025, deviation 0.0008 and 0.0017
    assert np.mean([f["text_to_image"]["r10"] for f in found]) == pytest.approx(0.25, abs=0.01)
    assert np.mean([f["text_to_image"]["median_rank"] for f in found]) == pytest.approx(20.5, abs=0.5)


def test_one_line_says_it(tmp_path: Path):
    share = {"r5": 0.2, "r10": 0.3, "median_rank": 20.0}
    found = {
        "images": 233,
        "captions": 1165,
        "text_to_image": {"r1": 0.0714, **share},
        "image_to_text": {"r1": 0.1, **share},
        "chance": {"text_to_image_r1": 1 / 233, "image_to_text_r1": 5 / 1165},
    }
    assert describe(json.loads(json.dumps(found))) == (
        "233 images, 1,165 captions: text to image R@1 7.1% (16.6x chance), R@5 20.0%; "
        "image to text R@1 10.0% (23.3x chance), R@5 20.0%"
    )
