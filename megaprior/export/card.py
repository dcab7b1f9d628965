"""The model card of an export: what it is, how it came to be, and whose weights it stands on.

It says what the checkpoint's manifest says, and "unknown" where there is none; no time, host or absolute path.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaprior.errors import DataError
from megaprior.files import atomic_write, read_manifest
from megaprior.tokenizer import Tokenizer
from megaprior.tokenizer.formats import Llama3
from megaprior.train.checkpoint import FORMAT, MANIFEST, resolve_model

UNKNOWN = "unknown"
NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "COPYING*")
LICENSES = "licenses"  # the folder of an export that holds its bases' notices
_LONGEST_CHAIN = 8  # stages that a model is followed back through

# Class of the model, of the processor, what both need to be told, what the processor reads.
_SNIPPETS = {
    "text": ("AutoModelForCausalLM", "AutoTokenizer", "", "", '"A photo of", return_tensors="pt"'),
    "ulvlm": (
        "AutoModelForCausalLM",
        "AutoProcessor",
        *[", trust_remote_code=True"] * 2,
        'images=Image.open("photo.jpg")',
    ),
    "hlvlm": (
        "LlavaForConditionalGeneration",
        "AutoProcessor",
        "",
        ', backend="pil"',
        'images=Image.open("photo.jpg").convert("RGB"), text="<image>", return_tensors="pt"',
    ),
}


@dataclass(frozen=True)
class Facts:
    """What is known of a model's origin; every text may be "unknown"."""

    stage: str
    steps: str
    seed: str
    weighting: str
    alpha: str
    length_scale: str
    begun_from: str  # name of the folder that its training started from
    fingerprints: dict[str, str]  # "model", "tokenizer", "scorer", "lm", "tower" where there is one
    sources: list[dict[str, Any]] = field(default_factory=list)  # build_id, samples, weight
    llama3: bool = False  # the tokenizer is Llama 3's
    trained_lm: bool = False  # of an H-LVLM: its language model trained with its MLP


@dataclass(frozen=True)
class Notice:
    """What a base folder says about its licence: its name, the licence its README names, the notice files copied from it."""

    base: str
    license: str
    files: tuple[str, ...]


def snippet(kind: str, path: str) -> list[str]:
    """Python lines that load the folder `path` and generate."""
    auto, processor, model_option, processor_option, call = _SNIPPETS[kind]
    return [
        *(["from PIL import Image"] if kind != "text" else []),
        f"from transformers import {auto}, {processor}",
        "",
        f'model = {auto}.from_pretrained("{path}"{model_option})',
        f'processor = {processor}.from_pretrained("{path}"{processor_option})',
        f"inputs = processor({call})",
        "ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)",
        "print(processor.decode(ids[0], skip_special_tokens=True))",
    ]


def read_facts(source: Path, *, fingerprint: str, tokenizer: Tokenizer, config: Any) -> Facts:
    """The facts of the model in `source`, from the manifest of its checkpoint where it lies in one."""
    manifest = _manifest_of(source)
    trajectory = manifest.get("trajectory", {})
    sources = manifest.get("data", {}).get("sources", [])
    scorers = sorted({entry["scorer"]["fingerprint"] for entry in sources if entry.get("scorer")})
    base = {name: entry["fingerprint"] for name, entry in (getattr(config, "base", None) or {}).items()}
    init = trajectory.get("model.init", UNKNOWN)
    return Facts(
        stage=str(manifest.get("stage", UNKNOWN)),
        steps=str(manifest.get("step", UNKNOWN)),
        seed=str(trajectory.get("seed", UNKNOWN)),
        weighting=str(trajectory.get("weighting.kind", UNKNOWN)),
        alpha=str(trajectory.get("weighting.alpha", UNKNOWN)),
        length_scale=str(trajectory.get("weighting.length_scale", UNKNOWN)),
        begun_from="random weights" if init is None else Path(init).name,
        fingerprints={
            "model": fingerprint,
            "tokenizer": tokenizer.fingerprint,
            **({"scorer": ", ".join(scorers)} if scorers else {}),
            **base,
        },
        sources=[{name: entry.get(name, UNKNOWN) for name in ("build_id", "samples", "weight")} for entry in sources],
        trained_lm=trajectory.get("model.trains") == "projector_and_lm",
        llama3=isinstance(tokenizer, Llama3) or (tokenizer.vocab_size, tokenizer.bos_id) == (128_256, 128_000),
    )


def base_notices(places: Sequence[Path], folder: Path) -> list[Notice]:
    """Copy the licence files of every model that these stand on into `folder`/licenses; say what each names.

    A model of ours is followed back through the stages that it was trained from, as far as their folders are still there.
    """
    found: dict[Path, Notice] = {}
    for place in places:
        for base in _ancestors(place):
            if base in found:
                continue
            files = sorted({file for pattern in NOTICES for file in base.glob(pattern) if file.is_file()})
            license = _front_matter(base / "README.md").get("license")
            if not files and not license:
                continue
            name = f"{len(found)}_{base.name}"
            for file in files:
                (folder / LICENSES / name).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / LICENSES / name / file.name)
            copied = tuple(f"{LICENSES}/{name}/{file.name}" for file in files)
            found[base] = Notice(base.name, str(license or UNKNOWN), copied)
    return list(found.values())


def write_card(
    folder: Path, *, kind: str, name: str, dtype: str, facts: Facts, notices: Sequence[Notice], appended: bool
) -> None:
    """Write `folder`/README.md; `appended`: the image token has a row that training did not have."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("megaprior.export"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    licenses = {notice.license for notice in notices}
    text = environment.get_template("model_card.md").render(
        kind=kind,
        name=name,
        dtype=dtype,
        facts=facts,
        notices=notices,
        license=licenses.pop() if len(licenses) == 1 and not facts.llama3 and licenses != {UNKNOWN} else "other",
        snippet=snippet(kind, name),
        appended=appended,
    )
    atomic_write(folder / "README.md", text.rstrip() + "\n")


def _ancestors(place: Path) -> Iterator[Path]:
    """The model's folder, that of the model it was trained from, and so on."""
    for _ in range(_LONGEST_CHAIN):
        yield place
        init = _manifest_of(place).get("trajectory", {}).get("model.init")
        if init is None:
            return
        try:
            place = resolve_model(init)
        except DataError:  # gone, or seen from another folder: the card names it all the same
            return


def _manifest_of(place: Path) -> dict[str, Any]:
    try:
        return read_manifest(place.parent / MANIFEST, format=FORMAT)
    except (DataError, OSError):
        return {}


def _front_matter(path: Path) -> dict[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        parts = text.split("---", 2)
        fields = yaml.safe_load(parts[1]) if text.startswith("---") and len(parts) == 3 else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}
