"""Every configuration that ships is valid, says how it is run, and points at files that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaprior.config import load_config
from megaprior.train.run import RunConfig
from megaprior.train.settings import check_run
from megaprior.train.zero3 import deepspeed_config, read_extras

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
CONFIGS = sorted((LAUNCH / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_it_loads_and_passes_the_checks_of_a_start(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Command:") for line in head)
    assert any(line.startswith("# Expect:") for line in head)
    cfg = load_config(RunConfig, path)
    check_run(cfg, world=8 if cfg.engine == "zero3" else 1)
    if isinstance(cfg.zero, Path):
        extras = read_extras(LAUNCH.parent / cfg.zero)
        deepspeed_config(extras, precision=cfg.precision, world=8, universal=False)


@pytest.mark.parametrize("family", ["ulvlm", "hlvlm"])
def test_the_baseline_differs_from_prior_in_two_fields(family: str) -> None:
    names = (f"{family}_paper", f"{family}_ntp_paper")
    prior, ntp = (load_config(RunConfig, LAUNCH / "configs" / f"{name}.yaml") for name in names)
    differing = {name for name in vars(prior) if getattr(prior, name) != getattr(ntp, name)}
    assert differing == {"out", "weighting"}


@pytest.mark.parametrize("path", sorted((LAUNCH / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_deepspeed_files_fit_the_contract(path: Path) -> None:
    assert (
        deepspeed_config(read_extras(path), precision="bf16", world=8, universal=False)["zero_optimization"]["stage"]
        == 3
    )
