"""YAML, `extends`, dotted overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaprior.config import configclass, dump_config, load_config
from megaprior.errors import UsageError


@configclass
class Inner:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)


@configclass
class Source:
    path: str
    weight: int = 1


@configclass
class Outer:
    steps: int
    optim: Inner = Inner()
    sources: tuple[Source, ...] = ()


def test_defaults_then_parent_then_file_then_overrides(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("steps: 5\noptim: {lr: 0.1}\n")
    (tmp_path / "run.yaml").write_text("extends: base.yaml\noptim: {betas: [0.8, 0.9]}\nsources: [{path: a}]\n")
    config = load_config(Outer, tmp_path / "run.yaml", ["optim.lr=3e-4", "sources.0.weight=2"])
    assert config == Outer(steps=5, optim=Inner(lr=3e-4, betas=(0.8, 0.9)), sources=(Source(path="a", weight=2),))
    assert dump_config(config)["optim"] == {"lr": 3e-4, "betas": [0.8, 0.9]}


@pytest.mark.parametrize(
    ("yaml", "overrides", "message"),
    [
        ("steps: 1\noptm: {}\n", [], "unknown key 'optm'; did you mean 'optim'"),
        ("steps: 1\noptim: {lrr: 1}\n", [], "unknown key 'optim.lrr'; did you mean 'lr'"),
        ("steps: many\n", [], "steps: .*got 'many'"),
        ("", [], "'steps' is required"),
        ("steps: 1\n", ["steps"], "an override is written key=value"),
        ("steps: 1\n", ["steps.x=1"], "steps: is the value 1"),
        ("steps: 1\nsources: [{path: a}]\n", ["sources.1.weight=1"], "the list has 1 entries"),
        ("- 1\n", [], "a configuration is a mapping"),
        ("a: [\n", [], "not YAML"),
    ],
)
def test_one_line_names_the_key_and_the_remedy(tmp_path: Path, yaml: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    with pytest.raises(UsageError, match=message) as caught:
        load_config(Outer, path, overrides)
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_extend_themselves(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    with pytest.raises(UsageError, match="circle"):
        load_config(Outer, tmp_path / "loop.yaml")
