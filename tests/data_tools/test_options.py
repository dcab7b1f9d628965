from __future__ import annotations

from pathlib import Path

import pytest

from megaprior.data_tools.options import BuildOptions, parse_subset
from megaprior.errors import UsageError


@pytest.mark.parametrize(("text", "subset"), [("0:1", (0.0, 1.0)), ("0:0.5", (0.0, 0.5)), (".25:.5", (0.25, 0.5))])
def test_subsets_as_they_are_typed(text: str, subset: tuple[float, float]) -> None:
    assert parse_subset(text) == subset


@pytest.mark.parametrize("text", ["0.5", "", "a:b", "0:1:2", "0.5:"])
def test_subsets_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected A:B"):
        parse_subset(text)


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("subset", (0.5, 0.5), "--subset"),
        ("subset", (-0.1, 0.5), "--subset"),
        ("subset", (0.5, 1.5), "--subset"),
        ("subset", (float("nan"), 1.0), "--subset"),
        ("max_sequence", 1, "--max-sequence"),
        ("captions", "some", "--captions"),
        ("turns", "some", "--turns"),
        ("caption_column", ("a", "b", "a"), "--caption-column a b a: a column is named twice"),
        ("format", "lmdb", "--format"),
        ("parquet_shard_bytes", 0, "0 bytes"),
    ],
)
def test_options_that_make_no_sense_name_their_flag(field: str, value: object, flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        BuildOptions(**{field: value})  # type: ignore[arg-type]


def test_no_absolute_path_is_recorded() -> None:
    assert "/" not in str(BuildOptions(images=Path("/home/me/photos")).recorded())
