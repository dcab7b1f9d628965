"""Every configuration that ships is valid, says how it is run, and points at files that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaprior.config import load_config
from megaprior.train.run import RunConfig
from megaprior.train.settings import check_run
from megaprior.train.zero3_config import resolve_extras, zero_stage

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
CONFIGS = sorted((LAUNCH / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_it_loads_and_passes_the_checks_of_a_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(LAUNCH.parent)  # a configuration names its DeepSpeed file from there
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for what in ("Command", "Hardware", "Hours", "Expect"):
        assert any(line.startswith(f"# {what}:") for line in head), what
    cfg = load_config(RunConfig, path)
    check_run(cfg, world=8 if cfg.engine == "zero3" else 1)


def stage(name: str) -> RunConfig:
    return load_config(RunConfig, LAUNCH / "configs" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("prior", "ntp"),
    [
        ("ulvlm_paper", "ulvlm_ntp_paper"),
        ("hlvlm_paper", "hlvlm_ntp_paper"),
        ("ulvlm_prior_tiny", "ulvlm_ntp_tiny"),
        ("hlvlm_prior_tiny", "hlvlm_tiny"),
    ],
)
def test_the_baseline_differs_from_prior_in_two_fields(prior: str, ntp: str) -> None:
    one, other = vars(stage(prior)), vars(stage(ntp))
    assert {name for name in one if one[name] != other[name]} == {"out", "weighting"}
    assert (one["weighting"].kind, other["weighting"].kind) == ("prior", "ntp")


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "configs"], ids=lambda path: path.stem
)
def test_a_stage_starts_from_the_output_of_another_by_name(path: Path) -> None:
    """Of a run of ours; `models/...` are other people's, which no stage makes."""
    cfg = load_config(RunConfig, path)
    made = {str(load_config(RunConfig, other).out) for other in CONFIGS if other != path}
    for init in (cfg.model.init, cfg.model.tower.init):
        if init is not None and not init.startswith("models/"):
            assert init in made


def test_no_two_stages_write_to_one_place() -> None:
    places = [load_config(RunConfig, path).out for path in CONFIGS]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("size", ["tiny", "paper"])
def test_instruction_tuning_is_twenty_steps_on_answers(size: str) -> None:
    for family, trains in (("hlvlm", "projector_and_lm"), ("ulvlm", "projector")):
        before, cfg = (
            stage(f"{family}_prior_tiny" if size == "tiny" else f"{family}_paper"),
            stage(f"instruct_{family}_{size}"),
        )
        assert (cfg.stage, cfg.steps, cfg.weighting.kind, cfg.data.text) == (family, 20, "ntp", [])
        assert cfg.model.trains == trains
        assert cfg.model.init == str(before.out)


def test_the_warm_up_shows_classes_for_five_hundred_steps_and_the_mix_comes_after() -> None:
    warm_up, after = stage("ulvlm_imagenet_paper"), stage("ulvlm_paper")
    assert (warm_up.steps, warm_up.weighting.kind, warm_up.data.text) == (500, "ntp", [])
    assert (after.steps, after.save_every, after.data.batch_size, after.data.mix_ratio) == (5000, 500, 512, 1.0)
    assert after.data.text
    assert after.model.init == str(warm_up.out)


@pytest.mark.parametrize("path", sorted((LAUNCH / "deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_deepspeed_files_fit_the_contract_and_are_explained(path: Path) -> None:
    extras = resolve_extras(path)
    assert str(zero_stage(extras)) in path.stem
    explained = (path.parent / "README.md").read_text()
    assert f"`{path.name}`" in explained
    options = extras["zero_optimization"]
    for key in options:
        assert f"`{key}`" in explained, key
