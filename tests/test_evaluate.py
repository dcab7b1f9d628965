from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megaprior.data.images import decode_rgb, patchify
from megaprior.errors import DataError, UsageError
from megaprior.evaluate import Item, evaluate, read_probe, read_results, run_probe, wilson
from megaprior.models.lm import ModelConfig, build_text_lm
from megaprior.models.ulvlm import build_ulvlm, load_ulvlm
from megaprior.tokenizer import Tokenizer, train_sentencepiece

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = [f"a photo of {n} red squares and one blue circle at dusk" for n in range(64)]
    return train_sentencepiece(text, tmp_path_factory.mktemp("tokenizer"), vocab_size=300)


@pytest.fixture(scope="module")
def save(tokenizer: Tokenizer) -> Callable[..., Path]:
    """`save(folder, sees=True, seed=0)`: a small model's Hugging Face folder."""

    def write(folder: Path, *, sees: bool = True, seed: int = 0) -> Path:
        ids = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        if sees:
            config = ModelConfig(llama=SIZES, patch=4, limit=16)
            model = build_ulvlm(config, **ids, roles=tokenizer.reserved_roles(), seed=seed)
        else:
            model = build_text_lm(ModelConfig(llama=SIZES), **ids, seed=seed)
        model.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer")
        return folder

    return write


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """Twelve items over six images of different shapes, half of them about shape."""
    (tmp_path / "images").mkdir()
    lines = []
    for i in range(12):
        name = f"images/{i % 6}.png"
        pixels = np.random.default_rng(i % 6).integers(0, 256, (8 + i % 3, 14, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        (tmp_path / name).write_bytes(file.getvalue())
        attribute = ("colour", "shape")[i % 2]
        lines.append(
            {"image": name, "true": f"a red square {i}", "false": f"a blue circle {i}", "attribute": attribute}
        )
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def likelihood(model_folder: Path, tokenizer: Tokenizer, image: Path, text: str) -> float:
    """log p(text and EOS | image), the segment written out by hand and read with transformers' own forward."""
    model = load_ulvlm(model_folder).double()
    roles = tokenizer.reserved_roles()
    assert roles is not None
    picture = decode_rgb(image.read_bytes())
    columns, rows = 4, {8: 3, 9: 3, 10: 3}[picture.height]  # 14 x 8..10 -> 16 x 12: c(14) = 16, c(8..10 * 16 / 14) = 12
    patches = patchify(picture, patch=4, size=(4 * columns, 4 * rows))
    ids, places = [tokenizer.bos_id, roles["start"]], []
    for row in range(rows):
        ids += [roles["row"]] if row else []
        places += range(len(ids), len(ids) + columns)
        ids += [roles["patch"]] * columns
    ids.append(roles["end"])
    start = len(ids)
    ids += [*tokenizer.encode(text), tokenizer.eos_id]
    row_ids = torch.tensor(ids)
    with torch.no_grad():
        embeds = model.embed(row_ids, torch.from_numpy(patches.copy()), torch.tensor(places))
        logits = model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
    return logits[torch.arange(start - 1, len(ids) - 1), row_ids[start:]].sum().item()


def test_right_is_a_likelier_true_statement_given_the_image(
    tmp_path: Path, probe: Path, save: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    model = save(tmp_path / "model")
    items = read_probe(probe)
    found = run_probe(model, items, shuffle_seed=0, row_tokens=64)
    right = np.array(
        [likelihood(model, tokenizer, i.image, i.true) > likelihood(model, tokenizer, i.image, i.false) for i in items]
    )
    assert 0 < right.mean() < 1, "a model that always or never is right cannot test this"
    assert found["accuracy"] == right.mean()
    assert found["by_attribute"]["colour"]["accuracy"] == right[::2].mean()
    assert found["by_attribute"]["shape"]["accuracy"] == right[1::2].mean()
    assert found["by_attribute"]["shape"]["items"] == 6
    low, high = found["interval"]
    assert low < found["accuracy"] < high
    assert "shuffled_accuracy" in found


def test_equal_statements_count_half_and_shuffling_needs_two_images(
    tmp_path: Path, probe: Path, save: Callable[..., Path]
) -> None:
    image = read_probe(probe)[0].image
    found = run_probe(
        save(tmp_path / "model"), [Item(image, "a photo", "a photo", "none")] * 3, shuffle_seed=0, row_tokens=64
    )
    assert found["accuracy"] == 0.5
    assert "shuffled_accuracy" not in found


def test_a_text_model_reads_the_statements_alone(tmp_path: Path, probe: Path, save: Callable[..., Path]) -> None:
    found = run_probe(save(tmp_path / "model", sees=False), read_probe(probe), shuffle_seed=0, row_tokens=64)
    assert found["sees"] is False
    assert "shuffled_accuracy" not in found
    assert 0 <= found["accuracy"] <= 1


def test_a_line_belongs_to_weights_not_to_a_name(
    tmp_path: Path, probe: Path, save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    model = save(tmp_path / "model")
    first = evaluate(model=model, probe=probe, output=output)
    assert evaluate(model=model, probe=probe, output=output) == first
    assert "probed already" in capsys.readouterr().err
    assert len(read_results(output)) == 1

    save(tmp_path / "model", seed=1)  # other weights under the same name
    second = evaluate(model=model, probe=probe, output=output)
    assert second["digest"] != first["digest"]
    image = read_probe(probe)[0].image
    image.write_bytes(read_probe(probe)[1].image.read_bytes())  # another probe under the same name
    third = evaluate(model=model, probe=probe, output=output)
    assert third["probe_digest"] != second["probe_digest"]
    assert [line["digest"] for line in read_results(output)] == [first["digest"], second["digest"], second["digest"]]


def test_a_half_written_line_is_passed_over_and_written_again(
    tmp_path: Path, probe: Path, save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    model = save(tmp_path / "model")
    line = evaluate(model=model, probe=probe, output=output)
    output.write_bytes(output.read_bytes()[:-20])
    assert evaluate(model=model, probe=probe, output=output) == line
    assert read_results(output) == [line]
    assert "line 1 is no result; passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: .*an item has image, true, false and attribute"),
        ('{"image": "images/0.png", "true": "a"}', "line 2: KeyError"),
        ('{"image": "images/0.png", "true": "a", "false": 3, "attribute": "x"}', "line 2: .*must be text"),
        (
            '{"image": "images/9.png", "true": "a", "false": "b", "attribute": "x"}',
            r"line 2: image .*9\.png is missing",
        ),
    ],
)
def test_a_bad_item_is_refused_by_line(probe: Path, line: str, message: str) -> None:
    first = probe.read_text().splitlines()[0]
    probe.write_text(f"{first}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_probe(probe)


def test_a_broken_image_and_a_short_row_are_refused_by_name(
    tmp_path: Path, probe: Path, save: Callable[..., Path]
) -> None:
    model, items = save(tmp_path / "model"), read_probe(probe)
    with pytest.raises(UsageError, match=r"\.png: with its statement \d+ tokens, a row holds 20"):
        run_probe(model, items, shuffle_seed=0, row_tokens=20)
    items[3].image.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"3\.png: .*html"):
        run_probe(model, items, shuffle_seed=0, row_tokens=64)


def test_wilson_against_published_values() -> None:
    """Wilson's interval as tabulated for 95%: 0 of 10, 5 of 10, and 390 of 500."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    low, high = wilson(390, 500)
    # the interval's ends solve |p - 0.78| = z * sqrt(p (1 - p) / 500)
    for p in (low, high):
        assert abs(p - 0.78) == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / 500), rel=1e-6)
