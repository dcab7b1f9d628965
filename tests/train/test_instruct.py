"""Instruction tuning: the loss lies on answers alone, and an H-LVLM's language model trains with its MLP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import losses
from safetensors.torch import load_file
from train_children import config, hlvlm_settings, make_bases, png, settings

from megaprior.data.loader import DataConfig, Loader, SourceConfig
from megaprior.data.vision import PatchSpec, TowerSpec, VisionSpec
from megaprior.data.weighting import WeightingConfig
from megaprior.data_tools.building.build import build
from megaprior.data_tools.options import BuildOptions
from megaprior.errors import CheckpointError, DataError, UsageError
from megaprior.export import export
from megaprior.models.fingerprint import model_fingerprint
from megaprior.tokenizer import load_model_tokenizer, load_tokenizer
from megaprior.train.checkpoint import complete_checkpoints, load_model_folder, resolve_model
from megaprior.train.run import train
from megaprior.train.settings import refuse_other_run, trajectory

PROJECTOR = {f"projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
WORDS = ("one red square", "two blue circles", "a photo at dusk")


def turns(number: int) -> list[tuple[str, str]]:
    """(question, answer) pairs of conversation `number`: one to three of them, of many lengths."""
    return [
        (
            f"photo of {number} at {turn} " * (1 + number % 4),
            f"{WORDS[(number + turn) % 3]} " * (1 + (number * turn) % 5),
        )
        for turn in range(1 + number % 3)
    ]


@pytest.fixture(scope="module")
def talks(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 18 conversations about pictures, from LLaVA's json."""
    folder = tmp_path_factory.mktemp("talks")
    records = []
    for number in range(18):
        (folder / f"{number}.png").write_bytes(png((32, 32), number))
        said = [[("human", question), ("gpt", answer)] for question, answer in turns(number)]
        talk = [{"from": who, "value": text} for pair in said for who, text in pair]
        talk[0]["value"] = "<image>\n" + talk[0]["value"]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (folder / "talks.json").write_text(json.dumps(records))
    options = BuildOptions(turns="all", images=folder)
    build([folder / "talks.json"], folder / "shards", tokenizer=world / "tokenizer", options=options)
    return folder / "shards"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `lm` (tied) and `tower`."""
    folder = tmp_path_factory.mktemp("bases")
    make_bases(folder)
    return folder


def instruct(talks: Path, init: Path, out: Path, *, stage: str = "hlvlm", **changes: Any) -> dict[str, Any]:
    """Six steps of instruction tuning from the run or folder `init`."""
    model = {
        "init": str(init),
        **({"trains": "projector_and_lm"} if stage == "hlvlm" else {}),
        **changes.pop("model", {}),
    }
    data = {
        "train": [{"path": str(talks)}],
        "batch_size": 6,
        "max_tokens": 160,
        "pad_to": 32,
        **changes.pop("data", {}),
    }
    values = settings(talks, out, stage=stage, model=model, data=data, weighting={"kind": "ntp"})
    return {**values, **changes}


@pytest.fixture(scope="module")
def pretrained(world: Path, bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained an MLP onto `bases` for two steps."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train(config(hlvlm_settings(world, bases, out, steps=2, save_every=2)))
    return out


@pytest.fixture(scope="module")
def tuned(talks: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instruction tuning from `pretrained` by its name, six steps, checkpoints after 3 and 6."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    train(config(instruct(talks, pretrained, out)))
    return out


def model_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step_{step:08d}" / "model"


@pytest.mark.parametrize("family", ["hlvlm", "ulvlm"])
@pytest.mark.parametrize("max_tokens", [160, 40], ids=["whole", "cut"])
def test_only_answers_are_in_the_loss_and_only_they_are_counted(
    talks: Path, world: Path, family: str, max_tokens: int
) -> None:
    tokenizer = load_tokenizer(world / "tokenizer")
    encode, eos = tokenizer.encode, tokenizer.eos_id
    spec: VisionSpec = PatchSpec(16, 32, 3, 4, 5, 6) if family == "ulvlm" else TowerSpec(32, 16, "crop", (0, 0, 0), 3)
    image = spec.tokens((32, 32))

    def answers(number: int) -> list[int]:
        """The tokens of a conversation's answers and their ends that a row has room for."""
        whole: list[tuple[int, bool]] = []
        for question, answer in turns(number):
            whole += [(token, False) for token in encode(question.strip() + "\n")]
            whole += [(token, True) for token in [*encode(answer.strip()), eos]]
        return [token for token, counts in whole[: max_tokens - 1 - image] if counts]

    data = DataConfig(train=[SourceConfig(path=str(talks))], batch_size=9, max_tokens=max_tokens, pad_to=8)
    loader = Loader(data, seed=1, weighting=WeightingConfig(), spec=spec, tokenizer=tokenizer)
    try:
        for step in range(2):  # one epoch
            batch = loader.batch(step)
            wanted = {int(number): answers(int(number)) for number in batch.sample_ids}
            assert batch.denominator == batch.num_loss_tokens == sum(map(len, wanted.values())) == batch.sum_g
            for row in batch.micro:
                edges = row.loss_cu.tolist()
                for at, number in enumerate(row.sample_ids.tolist()):
                    assert row.targets[edges[at] : edges[at + 1]].tolist() == wanted.pop(number)
                assert torch.equal(row.input_ids[row.loss_index + 1], row.targets)
                assert bool((row.token_weight == 1).all())
            assert not wanted
    finally:
        loader.close()


def test_prior_without_scores_of_these_conversations_is_refused(talks: Path, pretrained: Path, tmp_path: Path) -> None:
    values = instruct(talks, pretrained, tmp_path / "run", weighting={"kind": "prior"})
    with pytest.raises(DataError, match=r"ref_logprob.*megaprior score") as refused:
        train(config(values))
    assert "\n" not in str(refused.value)


def test_mlp_and_language_model_train_and_the_tower_does_not(
    tuned: Path, pretrained: Path, talks: Path, bases: Path, tmp_path: Path
) -> None:
    before = {name: model_fingerprint(bases / name) for name in ("lm", "tower")}
    first, last = (model_folder(tuned, step) for step in (3, 6))
    for folder in (first, last):
        assert set(load_file(folder / "model.safetensors")) == PROJECTOR
    started = load_file(model_folder(pretrained, 2) / "model.safetensors")
    ended = load_file(last / "model.safetensors")
    assert not any(torch.equal(started[name], ended[name]) for name in PROJECTOR)
    given, trained = (load_file(folder / "model.safetensors") for folder in (bases / "lm", last / "lm"))
    assert given.keys() == trained.keys()
    assert not any(torch.equal(given[name], trained[name]) for name in given)
    said = json.loads((last / "config.json").read_text())["base"]
    assert said["lm"] == {"fingerprint": model_fingerprint(last / "lm"), "given": "lm", "path": "lm"}
    assert said["tower"]["fingerprint"] == before["tower"]
    assert len({c.manifest["frozen"] for c in complete_checkpoints(tuned)}) == 1
    assert {name: model_fingerprint(bases / name) for name in before} == before, "what it stood on is as it was"
    # The first step saw the pre-trained model: with the language model frozen, its loss is the same to the bit.
    frozen = instruct(
        talks, pretrained, tmp_path / "frozen", model={"trains": "projector"}, steps=1, optim={"lr": 3e-3}
    )
    train(config(frozen))
    assert losses(tmp_path / "frozen") == losses(tuned)[:1]
    assert not (model_folder(tmp_path / "frozen", 1) / "lm").exists()


def test_its_run_names_a_model_for_every_reader(tuned: Path, talks: Path, tmp_path: Path) -> None:
    model, lm = load_model_folder(tuned), load_file(model_folder(tuned, 6) / "lm" / "model.safetensors")
    assert torch.equal(model.lm.model.embed_tokens.weight, lm["model.embed_tokens.weight"])
    assert (
        load_model_tokenizer(model_folder(tuned, 6) / "lm").fingerprint
        == load_model_tokenizer(resolve_model(tuned)).fingerprint
    )
    made = export(tuned, tmp_path / "export")
    assert made["kind"] == "hlvlm"
    assert made["worst"] < 1e-4, "an export that differs is refused: FAULTS 43"
    said = (tmp_path / "export" / "README.md").read_text()
    assert json.loads((model_folder(tuned, 6) / "config.json").read_text())["base"]["lm"]["fingerprint"][:8] in said
    # A next stage stands on the trained language model where it lies.
    train(config(instruct(talks, tuned, tmp_path / "next", model={"trains": "projector"}, steps=1, optim={"lr": 3e-3})))
    assert load_model_folder(tmp_path / "next").places["lm"].samefile(model_folder(tuned, 6) / "lm")


def test_it_resumes_bit_for_bit(tuned: Path, talks: Path, pretrained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tuned, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "step_00000006")
    train(config(instruct(talks, pretrained, other)))
    assert losses(other) == losses(tuned)
    for name in ("model.safetensors", "lm/model.safetensors"):
        assert (model_folder(other, 6) / name).read_bytes() == (model_folder(tuned, 6) / name).read_bytes()


def test_a_corrupted_language_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tuned, tmp_path / "other")
    with open(model_folder(other, 6) / "lm" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"lm/model\.safetensors: block 0"):
        resolve_model(other)


def test_what_trains_is_part_of_a_runs_identity(world: Path, bases: Path, pretrained: Path, tmp_path: Path) -> None:
    other = shutil.copytree(pretrained, tmp_path / "run")
    values = hlvlm_settings(world, bases, other, steps=2, save_every=2, model={"trains": "projector_and_lm"})
    with pytest.raises(UsageError, match=r"begun with model\.trains='projector', the command says 'projector_and_lm'"):
        train(config(values))
    old = trajectory(config(hlvlm_settings(world, bases, other)))
    del old["model.trains"]  # a record from before there was a choice
    refuse_other_run(config(hlvlm_settings(world, bases, other)), old, done=2, where=other)
    with pytest.raises(UsageError, match=r"begun with model\.trains='projector'"):
        refuse_other_run(config({**values, "steps": 6}), old, done=2, where=other)
    with pytest.raises(UsageError, match=r"model\.trains=projector_and_lm is for stage=hlvlm; stage=ulvlm trains"):
        train(config(settings(world, tmp_path / "u", model={"trains": "projector_and_lm"})))


def test_a_ulvlm_is_tuned_as_a_whole_from_its_run(world: Path, talks: Path, tmp_path: Path) -> None:
    train(config(settings(world, tmp_path / "vlp", steps=2, save_every=2)))
    train(config(instruct(talks, tmp_path / "vlp", tmp_path / "run", stage="ulvlm", steps=3)))
    before, after = (
        load_file(model_folder(tmp_path / name, step) / "model.safetensors") for name, step in (("vlp", 2), ("run", 3))
    )
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_two_ranks_equal_one_process(
    talks: Path, pretrained: Path, tmp_path: Path, launch: Callable[..., list[int]], spawn: Callable[..., Any]
) -> None:
    """A tied language model is partitioned, the tower replicated; rows of one to several talks, dummies; one rank resumes."""
    changes: dict[str, Any] = {"steps": 12, "save_every": 6, "data": {"batch_size": 3, "max_tokens": 120}}
    values = instruct(talks, pretrained, tmp_path / "local", **changes)
    single = spawn(values, {"gradients": str(tmp_path / "local.pt")})
    single.join(120)
    assert single.exitcode == 0
    both = {**values, "out": str(tmp_path / "both"), "activation_checkpointing": "full"}
    assert launch(both, fault={"gradients": str(tmp_path / "both.pt")}) == [0, 0]
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("local", "both"))
    assert first.keys() == second.keys()
    assert {name.split(".")[1] for name in first} == {"projector", "language_model"}
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-5, msg=name)
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "local"), rel=0, abs=1e-5)
    one, other = (
        load_file(model_folder(tmp_path / name, 12) / "lm" / "model.safetensors") for name in ("local", "both")
    )
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-4, msg=name)
    # Another number of ranks goes on with the language model it trained and the tower it should have.
    shutil.rmtree(tmp_path / "both" / "checkpoints" / "step_00000012")
    assert launch(both, world=1) == [0]
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "local"), rel=0, abs=2e-5)
    assert len({c.manifest["frozen"] for name in ("local", "both") for c in complete_checkpoints(tmp_path / name)}) == 1


@pytest.mark.slow
def test_bf16_trains_like_fp32_at_first(
    talks: Path, pretrained: Path, tuned: Path, tmp_path: Path, launch: Callable[..., list[int]]
) -> None:
    model = {"dtype": "bfloat16", "frozen_dtype": "bfloat16"}
    assert launch(instruct(talks, pretrained, tmp_path / "half", model=model, precision="bf16")) == [0, 0]
    assert losses(tmp_path / "half") == pytest.approx(losses(tuned), rel=2e-2)
    assert losses(tmp_path / "half") != pytest.approx(losses(tuned), rel=1e-5)
    assert {t.dtype for t in load_file(model_folder(tmp_path / "half", 6) / "lm" / "model.safetensors").values()} == {
        torch.bfloat16
    }
