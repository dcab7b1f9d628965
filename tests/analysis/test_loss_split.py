from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaprior.analysis.loss_split import heldout_losses, shuffled_images
from megaprior.analysis.losses import read_losses
from megaprior.errors import UsageError

CAPTIONS = ["a red square", "a red square at dusk", "one blue circle", "a photo", "2 squares and one circle at dusk"]
IMAGES = [0, 0, 1, 2, 1]


def test_shuffling_gives_every_image_another_one_and_all_its_captions_the_same() -> None:
    ids, image = np.array([10, 11, 12, 13, 14]), np.array([0, 0, 1, 2, 1])
    for seed in range(20):
        shown = shuffled_images(ids, image, seed)
        assert shown is not None
        of = dict(zip(ids.tolist(), image.tolist(), strict=True))
        other = np.array([of[i] for i in shown.tolist()])
        assert (other != image).all()
        assert other[0] == other[1]
        assert sorted(set(other.tolist())) == [0, 1, 2]  # a cycle: every image is shown
    assert shuffled_images(ids, np.zeros(5, np.int64), 0) is None


def test_losses_with_shuffled_images_are_those_of_a_folder_with_those_images(
    tmp_path: Path, write_pairs: Callable[..., Path], save_ulvlm: Callable[..., Path]
) -> None:
    model = save_ulvlm(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs", CAPTIONS, images=IMAGES)
    heldout_losses(model, pairs, image_shuffle_seed=3, output=tmp_path / "true", row_tokens=64)
    _, found = read_losses(tmp_path / "true" / "heldout_pairs.json")
    assert found.nll_shuffled is not None
    assert np.abs(found.nll_shuffled - found.nll).max() > 0.01  # the model does look

    shown = shuffled_images(found.ids, found.image, 3)
    assert shown is not None
    swapped = write_pairs(tmp_path / "swapped", CAPTIONS, images=[IMAGES[i] for i in shown])
    heldout_losses(model, swapped, output=tmp_path / "swapped_out", row_tokens=4096)
    _, expected = read_losses(tmp_path / "swapped_out" / "heldout_swapped.json")
    np.testing.assert_allclose(found.nll_shuffled, expected.nll, rtol=0, atol=1e-5)


def test_everything_is_aligned_by_token(
    tmp_path: Path, write_pairs: Callable[..., Path], save_ulvlm: Callable[..., Path]
) -> None:
    from megaprior.data.shards import ShardSet

    model = save_ulvlm(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs", CAPTIONS, images=IMAGES)
    body = heldout_losses(model, pairs, output=tmp_path / "out", captions=3)
    _, found = read_losses(tmp_path / "out" / "heldout_pairs.json")
    shards = ShardSet.open(pairs, scores="ref_logprob")
    assert len(found.ids) == 3
    assert np.diff(found.cu).tolist() == shards.token_counts[found.ids].tolist()
    for s, i in enumerate(found.ids.tolist()):
        part = slice(found.cu[s], found.cu[s + 1])
        assert found.word_class is not None
        assert found.w is not None
        assert found.word_class[part].tolist() == shards.word_class(i).tolist()
        np.testing.assert_allclose(found.w[part], 1 - np.exp(shards.scores(i).astype(np.float64)), rtol=1e-12)
    assert body["summary"]["captions"] == 3
    assert body["summary"]["loss"] == pytest.approx(found.nll.astype(np.float64).mean())


def test_kept_losses_stand_for_the_same_weights_only(
    tmp_path: Path,
    write_pairs: Callable[..., Path],
    save_ulvlm: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pairs = write_pairs(tmp_path / "pairs", CAPTIONS, images=IMAGES)
    first = heldout_losses(save_ulvlm(tmp_path / "model"), pairs, output=tmp_path / "out")
    assert heldout_losses(tmp_path / "model", pairs, output=tmp_path / "out") == first
    assert "already" in capsys.readouterr().err
    other = heldout_losses(save_ulvlm(tmp_path / "model", seed=1), pairs, output=tmp_path / "out")
    assert other["model_digest"] != first["model_digest"]
    assert other["summary"]["loss"] != first["summary"]["loss"]


def test_losses_of_a_folder_that_is_no_run_need_a_place(
    tmp_path: Path, write_pairs: Callable[..., Path], save_ulvlm: Callable[..., Path]
) -> None:
    pairs = write_pairs(tmp_path / "pairs", CAPTIONS, images=IMAGES)
    with pytest.raises(UsageError, match="not a run's folder"):
        heldout_losses(save_ulvlm(tmp_path / "model"), pairs)
