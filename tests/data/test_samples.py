"""The row that a model sees, against arrays written by hand."""

from __future__ import annotations

import inspect
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import torch

from megaprior.data.samples import Batch, Segment, assemble
from megaprior.data.vision import PatchSpec, VisionSpec, segment_length
from megaprior.models.lm import TextLM

BOS, EOS = 1, 2
PATCH, START, ROW, END = 90, 91, 92, 93
SPEC = PatchSpec(patch=2, limit=8, patch_id=PATCH, start_id=START, row_id=ROW, end_id=END)
D = 12


def patches(count: int, value: int) -> np.ndarray:
    return np.full((count, D), value, dtype=np.uint8)


def pair(**changes: object) -> Segment:
    """An image of 2 x 2 patches and the caption 10 11 EOS."""
    values: dict = {
        "sample_id": 7,
        "tokens": np.array([10, 11, EOS], dtype=np.uint16),
        "token_weight": np.array([0.5, 1.5, 1.0], dtype=np.float32),
        "scores": np.array([-0.1, -2.0, -0.5], dtype=np.float32),
        "grid": (2, 2),
        "patches": patches(4, 3),
    }
    return Segment(**{**values, **changes})


def text(**changes: object) -> Segment:
    values: dict = {
        "sample_id": 9,
        "tokens": np.array([20, 21, 22, EOS], dtype=np.int32),
        "token_weight": np.ones(4, dtype=np.float32),
    }
    return Segment(**{**values, **changes})


def row(*segments: Segment, pad_to: int = 8, max_tokens: int = 64, spec: VisionSpec | None = SPEC) -> Batch:
    return assemble(segments, bos_id=BOS, spec=spec, denominator=31, max_tokens=max_tokens, pad_to=pad_to)


def test_a_spec_is_read_from_a_models_configuration() -> None:
    roles = {"end": END, "patch": PATCH, "row": ROW, "start": START}  # in any order
    assert VisionSpec.of(SimpleNamespace(patch=2, limit=8, vision_roles=roles)) == SPEC
    assert VisionSpec.of(SimpleNamespace(hidden_size=8)) is None  # a text LM


def test_a_models_inputs_are_those_that_its_states_takes() -> None:
    taken = inspect.signature(TextLM.states).parameters.keys() - {"self"}
    batch = row(pair())
    assert batch.inputs.keys() == taken
    assert all(batch.inputs[name] is getattr(batch, name) for name in taken)


def test_a_pair_a_text_and_the_padding_tail() -> None:
    batch = row(pair(), text())
    # fmt: off
    #                                  0     1      2      3     4    5      6      7    8   9  10 | 11                     | 16
    assert batch.input_ids.tolist() == [BOS, START, PATCH, PATCH, ROW, PATCH, PATCH, END, 10, 11, EOS,
                                        BOS, 20, 21, 22, EOS]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10,  0, 1, 2, 3, 4]
    # fmt: on
    assert batch.cu_seqlens.tolist() == [0, 11, 16]
    assert batch.max_seqlen == 11
    assert batch.loss_index.tolist() == [7, 8, 9, 11, 12, 13, 14]  # </vision> predicts the first caption token
    assert batch.targets.tolist() == [10, 11, EOS, 20, 21, 22, EOS]
    assert batch.token_weight.tolist() == [0.5, 1.5, 1.0, 1, 1, 1, 1]
    assert batch.loss_cu.tolist() == [0, 3, 7]
    assert batch.sample_ids.tolist() == [7, 9]
    assert batch.patch_index.tolist() == [2, 3, 5, 6]
    assert batch.patches.tolist() == [[3] * D] * 4
    np.testing.assert_array_equal(batch.scores, np.array([-0.1, -2, -0.5, *[np.nan] * 4], dtype=np.float32))
    assert batch.denominator == 31.0
    assert batch.num_real_tokens == 16
    padded = row(pair(), text(), pad_to=10)
    assert padded.input_ids.tolist() == batch.input_ids.tolist() + [BOS] * 4
    assert padded.position_ids.tolist() == [*batch.position_ids.tolist(), 0, 1, 2, 3]
    assert padded.cu_seqlens.tolist() == [0, 11, 16, 20]
    assert padded.loss_cu.tolist() == [0, 3, 7]
    assert padded.num_real_tokens == 16


def test_two_images_share_one_patch_array_in_row_order() -> None:
    batch = row(
        pair(grid=(1, 1), patches=patches(1, 5)), pair(sample_id=8, grid=(3, 1), patches=patches(3, 6)), pad_to=1
    )
    ids = [BOS, START, PATCH, END, 10, 11, EOS, BOS, START, PATCH, PATCH, PATCH, END, 10, 11, EOS]
    assert batch.input_ids.tolist() == ids
    assert batch.patch_index.tolist() == [2, 9, 10, 11]
    assert batch.patches[:, 0].tolist() == [5, 6, 6, 6]
    assert (batch.input_ids[batch.patch_index] == PATCH).all()


def test_loss_spans_leave_the_other_tokens_in_the_row() -> None:
    batch = row(text(loss=np.array([1, 3]), token_weight=np.ones(2, dtype=np.float32)))
    assert batch.input_ids.tolist() == [BOS, 20, 21, 22, EOS, BOS, BOS, BOS]
    assert batch.loss_index.tolist() == [1, 3]
    assert batch.targets.tolist() == [21, EOS]
    assert batch.loss_cu.tolist() == [0, 2]


def test_a_dummy_row_has_tokens_and_no_loss() -> None:
    batch = row()
    assert batch.input_ids.tolist() == [BOS] * 8
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert batch.max_seqlen == 8
    assert batch.loss_cu.tolist() == [0]
    assert batch.num_real_tokens == 0
    for name, shape in (("loss_index", (0,)), ("targets", (0,)), ("token_weight", (0,)), ("patches", (0, D))):
        assert getattr(batch, name).shape == shape
    assert row(spec=None).patches.shape == (0, 0)


def test_rows_are_padded_but_never_beyond_max_tokens() -> None:
    assert len(row(text(), max_tokens=6).input_ids) == 6
    assert len(row(text(), max_tokens=5).input_ids) == 5
    assert row(text(), max_tokens=5).cu_seqlens.tolist() == [0, 5]
    assert len(row(max_tokens=3).input_ids) == 3


def test_every_tensor_has_its_dtype_also_in_a_dummy() -> None:
    int64 = ("input_ids", "position_ids", "loss_index", "targets", "sample_ids", "patch_index")
    expected = dict.fromkeys(int64, torch.int64) | {"cu_seqlens": torch.int32, "loss_cu": torch.int32}
    expected |= {"token_weight": torch.float32, "scores": torch.float32, "patches": torch.uint8}
    for batch in (row(pair(), text()), row(text()), row(), row(spec=None)):
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if torch.is_tensor(getattr(batch, f.name))}
        assert {name: tensor.dtype for name, tensor in tensors.items()} == expected


def test_to_moves_every_tensor() -> None:
    batch = row(pair()).to("meta")
    assert {getattr(batch, f.name).device.type for f in fields(batch) if torch.is_tensor(getattr(batch, f.name))} == {
        "meta"
    }
    assert batch.num_real_tokens == 11


def test_lengths_follow_the_design() -> None:
    assert SPEC.tokens((4, 4)) == 2 * 2 + 1 + 2  # columns * rows, separators, start and end
    assert SPEC.tokens((16, 8)) == 4 * 2 + 1 + 2  # long side 8 of the limit, short side 8 * 8 / 16
    assert segment_length(SPEC, (4, 4), 3) == row(pair()).num_real_tokens
    assert segment_length(SPEC, None, 4) == segment_length(None, (4, 4), 4) == row(text()).num_real_tokens
    paper = PatchSpec(patch=32, limit=1024, patch_id=PATCH, start_id=START, row_id=ROW, end_id=END)
    assert paper.grid((500, 375)) == (16, 12)  # 512 x 384
    assert paper.tokens((2000, 2000)) == 32 * 32 + 31 + 2
