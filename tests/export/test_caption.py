"""`megaprior caption`: the same words from a run and from its export, colours where there is a terminal, one line where not."""

from __future__ import annotations

import io
import math

import pytest
import torch
from export_world import pictures, trainer_inputs
from rich.console import Console

from megaprior.caption import caption
from megaprior.cli import main
from megaprior.data.images import decode_rgb
from megaprior.errors import DataError, UsageError
from megaprior.models.load import load_model


@pytest.fixture
def images(tmp_path):
    paths = []
    for name in ("wide", "turned"):
        paths.append(tmp_path / f"{name}.img")
        paths[-1].write_bytes(pictures()[name])
    return paths


def printed(*, terminal: bool) -> Console:
    system = "truecolor" if terminal else None
    return Console(file=io.StringIO(), force_terminal=terminal, highlight=False, soft_wrap=True, color_system=system)


@pytest.mark.parametrize("kind", ["ulvlm", "hlvlm", "hlvlm_appended"])
def test_a_run_and_its_export_say_the_same(world, exports, as_run, images, tmp_path, kind) -> None:
    one = caption(world.folders[kind], images, max_tokens=8, console=printed(terminal=False))
    two = caption(exports(kind), images, max_tokens=8, console=printed(terminal=False))
    assert [found.texts for found in one] == [found.texts for found in two]
    for a, b in zip(one, two, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert len(a.logprobs) == len(a.texts) <= 8


def test_the_numbers_are_the_trainers_log_probabilities(world, images) -> None:
    ours = load_model(world.folders["ulvlm"])
    found = caption(world.folders["ulvlm"], images, max_tokens=6, console=printed(terminal=False))
    for path, said in zip(images, found, strict=True):
        tokens: list[int] = []
        for logprob in said.logprobs:
            inputs = trainer_inputs(ours, world.tokenizer, decode_rgb(path.read_bytes()), tokens)
            with torch.no_grad():
                logits = ours.lm_head(ours.states(**inputs).hidden[-1:])[0].log_softmax(-1)
            allowed = logits.clone()
            allowed[3:7] = -torch.inf  # image tokens are no words
            tokens.append(int(allowed.argmax()))
            assert float(logits[tokens[-1]]) == pytest.approx(logprob, abs=1e-4)
        assert said.text == world.tokenizer.decode(token for token in tokens if token != 2)


def test_colours_are_for_terminals(world, images, monkeypatch) -> None:
    model = world.folders["ulvlm"]
    console = printed(terminal=True)
    (found,) = caption(model, images[:1], max_tokens=4, console=console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in shown
    assert "each token by its probability p: above 0.9" in shown.replace("\x1b[0m", "").replace("\x1b[32m", "")

    console = printed(terminal=False)
    caption(model, images[:1], max_tokens=4, console=console)
    plain = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" not in plain
    assert "--numbers prints: the log-probability of each token" in plain

    console = printed(terminal=False)
    caption(model, images[:1], max_tokens=4, numbers=True, console=console)
    assert f"({found.logprobs[0]:.2f})" in console.file.getvalue()  # type: ignore[attr-defined]

    monkeypatch.setenv("NO_COLOR", "1")
    console = printed(terminal=True)
    caption(model, images[:1], max_tokens=4, console=console)
    assert "\x1b[3" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_caption_cannot_command_the_terminal(world, images, monkeypatch) -> None:
    from megaprior import caption as module

    evil = module.Caption(["\x1b[2J", "a\nb"], [math.log(0.95), -9.0], ended=False)
    monkeypatch.setattr(module, "write_caption", lambda *_, **__: evil)
    console = printed(terminal=False)
    module.caption(world.folders["ulvlm"], images[:1], console=console)
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]
    assert "a\N{REPLACEMENT CHARACTER}b" in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_empty_caption_is_not_an_empty_line(world, images, monkeypatch) -> None:
    from megaprior import caption as module

    monkeypatch.setattr(module, "write_caption", lambda *_, **__: module.Caption([""], [-0.1], ended=True))
    console = printed(terminal=False)
    module.caption(world.folders["ulvlm"], images[:1], console=console)
    assert "  [end]\n" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_cannot_be_captioned_is_one_line(world, images, tmp_path, capsys) -> None:
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    model = world.folders["ulvlm"]
    with pytest.raises(
        DataError, match=r"page.jpg: html: 22 bytes that are html; JPEG, PNG, WebP, GIF and BMP are read"
    ):
        caption(model, [images[0], tmp_path / "page.jpg"])
    with pytest.raises(DataError, match=r"none.jpg: No such file or directory"):
        caption(model, [tmp_path / "none.jpg"])
    with pytest.raises(UsageError, match=r"--max-tokens 0: a caption has at least 1 token"):
        caption(model, images, max_tokens=0)
    with pytest.raises(DataError, match=r"a text-only model; give a vision-language model"):
        caption(world.folders["text"], images)
    with pytest.raises(DataError, match=r"a two-tower model compares images with captions and writes none"):
        caption(world.folders["clip"], images)
    assert main(["caption", str(model), str(images[0]), str(tmp_path / "page.jpg")]) == 65
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1


def test_the_command(exports, images, capsys) -> None:
    assert main(["caption", str(exports("ulvlm")), *map(str, images), "--max-tokens", "3", "--numbers"]) == 0
    said = capsys.readouterr().out
    assert all(f"{path}  (3 tokens, cut, mean log-probability -" in said for path in images)
