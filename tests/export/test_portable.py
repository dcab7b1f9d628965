"""The file that travels with a U-LVLM, and the processors: transformers alone, and the trainer's pixels."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_world import pictures, trainer_inputs
from PIL import Image
from transformers import AutoProcessor

from megaprior.data.images import decode_rgb, target_size
from megaprior.data.vision import VisionSpec
from megaprior.export.foreign import PORTABLE, load_foreign
from megaprior.models import ulvlm_portable
from megaprior.models.load import load_model
from megaprior.models.vision import to_pixels

REMOTE = """
import json, sys, io
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

folder, picture = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
image = Image.open(picture)
one = processor(images=image)
cached, uncached = (
    model.generate(**one, max_new_tokens=12, do_sample=False, use_cache=cache)[0].tolist() for cache in (True, False)
)
other = image.convert("RGB").resize((33, 61))
both = processor(images=[image, other], text=["a photo", ""])
first, second = processor(images=image, text="a photo"), processor(images=other)
padded = model.generate(**both, max_new_tokens=8, do_sample=False)[:, -8:].tolist()
alone = [model.generate(**x, max_new_tokens=8, do_sample=False)[0, -8:].tolist() for x in (first, second)]
print(json.dumps({
    "cached": cached, "uncached": uncached, "padded": padded, "alone": alone, "ids": one["input_ids"][0].tolist(),
    "patches": one["patches"][0].tolist(), "module": type(model).__module__,
    "ours": [name for name in sys.modules if name == "megaprior" or name.startswith("megaprior.")],
    "other_auto": type(AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)).__name__,
}))
"""


def test_it_imports_what_everybody_has() -> None:
    tree = ast.parse(Path(ulvlm_portable.__file__).read_text(encoding="utf-8"))
    named = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    named |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert named - set(sys.stdlib_module_names) == {"torch", "transformers", "PIL", "numpy"}


def test_a_stranger_without_megaprior_loads_it_and_generates(world, exports, tmp_path) -> None:
    (tmp_path / "picture.png").write_bytes(pictures()["transparent"])
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(exports("ulvlm")), str(tmp_path / "picture.png")],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] == []
    assert found["module"].endswith(PORTABLE)
    assert found["other_auto"] == "ULVLMForCausalLM"
    assert found["cached"] == found["uncached"]
    assert len(found["cached"]) > len(found["ids"])
    for padded, alone in zip(found["padded"], found["alone"], strict=True):
        ended = padded.index(2) + 1 if 2 in padded else len(padded)  # EOS, then padding
        assert padded[:ended] == alone[-ended:] or padded == alone
    ours = load_model(world.folders["ulvlm"])
    inputs = trainer_inputs(ours, world.tokenizer, decode_rgb(pictures()["transparent"]), [])
    assert found["ids"] == inputs["input_ids"].tolist()
    assert found["patches"] == inputs["patches"].tolist()


@pytest.mark.parametrize("name", pictures())
def test_its_processor_makes_the_trainers_patches_bit_for_bit(world, exports, name) -> None:
    processor = load_foreign(exports("ulvlm")).processor
    data = pictures()[name]
    with Image.open(
        io.BytesIO(data)
    ) as picture:  # as a user opens it: rotation, alpha and depth are the processor's work
        found = processor(images=picture)
    expected = trainer_inputs(load_model(world.folders["ulvlm"]), world.tokenizer, decode_rgb(data), [])
    assert found["input_ids"][0].tolist() == expected["input_ids"].tolist()
    assert found["patches"].dtype == torch.uint8
    assert torch.equal(found["patches"][0], expected["patches"])


def test_both_know_the_same_sizes() -> None:
    random = np.random.default_rng(0)
    for width, height in random.integers(1, 3000, (2000, 2)).tolist():
        for patch, limit in ((8, 64), (32, 1024), (16, 16)):
            found = ulvlm_portable.target_size(width, height, patch=patch, limit=limit)
            assert found == target_size(width, height, patch=patch, limit=limit)


@pytest.mark.parametrize("kind", ["hlvlm", "hlvlm_crop", "hlvlm_square"])
def test_llavas_processor_makes_the_trainers_pixels(world, exports, kind) -> None:
    processor = AutoProcessor.from_pretrained(exports(kind), backend="pil")
    config = load_model(world.folders[kind]).config
    spec = VisionSpec.of(config)
    assert spec is not None
    for data in pictures().values():
        image = decode_rgb(data)
        patches = torch.from_numpy(spec.patches(image, spec.grid(image.size)))
        raw = to_pixels(patches, side=32, mean=(0.0,) * 3, std=(1 / 255,) * 3)
        found = processor.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="pt")
        assert torch.equal(found["pixel_values"].float(), raw)  # every pixel, bit for bit
        scaled = to_pixels(patches, side=32, mean=tuple(config.image_mean), std=tuple(config.image_std))
        found = processor(images=image, text="<image>", return_tensors="pt")
        assert (found["pixel_values"] - scaled).abs().max() < 2e-6  # measured: at most 4.8e-7
        assert found["input_ids"].shape == (1, 17)


def test_more_patch_tokens_than_patches_are_refused(exports) -> None:
    opened = load_foreign(exports("ulvlm"))
    inputs = opened.processor(images=decode_rgb(pictures()["square"]))
    with pytest.raises(ValueError, match=r"25 patch tokens, but 24 patches were given"):
        opened.model(input_ids=inputs["input_ids"], patches=inputs["patches"][:, :-1])
    with pytest.raises(ValueError, match=r"2 images and 1 texts"):
        opened.processor(images=[decode_rgb(pictures()["square"])] * 2, text="a")
    with pytest.raises(ValueError, match=r"only 'pt' is supported"):
        opened.processor(text="a", return_tensors="np")


def test_text_alone_is_read_too(world, exports) -> None:
    opened = load_foreign(exports("ulvlm"))
    ours = load_model(world.folders["ulvlm"])
    tokens = world.tokenizer.encode("one blue circle")
    with torch.no_grad():
        expected = ours.lm_head(ours.states(**trainer_inputs(ours, world.tokenizer, None, tokens)).hidden)
        found = opened.model(**opened.processor(text="one blue circle")).logits[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
