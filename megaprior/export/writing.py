"""`megaprior export`: one folder, whole or absent, that holds a trained model for other programs, and proof that it does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from megaprior.errors import DataError, UsageError
from megaprior.export.card import base_notices, read_facts, snippet, write_card
from megaprior.export.checking import (
    TOLERANCE,
    compare_logits,
    compare_tensors,
    our_logits,
    tensor_digests,
    their_logits,
)
from megaprior.export.foreign import PORTABLE, Foreign, load_foreign, to_foreign
from megaprior.files import atomic_folder
from megaprior.models.fingerprint import model_fingerprint
from megaprior.models.folder import model_type, quiet
from megaprior.models.hlvlm import HLVLM
from megaprior.models.lm import TextLM
from megaprior.models.load import load_model
from megaprior.models.vision import KINDS
from megaprior.telemetry import say
from megaprior.tokenizer import load_model_tokenizer
from megaprior.tokenizer.hugging_face import check_same
from megaprior.train.checkpoint import resolve_model


def export(
    model: Path | str,
    output: Path | str,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_size: str = "5GB",
    check: bool = True,
) -> dict[str, Any]:
    """Write a trained model as a Hugging Face folder, reload it, and compare it with the trainer's model.

    Every tensor is compared by shape, dtype and digest. Logits of a fixed row are compared in fp32 arithmetic, for weights of
    either dtype, so that one tolerance holds for both: 1e-4, relative to the largest logit.

    Args:
        model: a run (its newest checkpoint), a checkpoint, or a model's folder.
        output: the folder to make; it must not exist.
        dtype: of the saved weights.
        max_shard_size: of one safetensors file, as transformers reads it ("5GB").
        check: whether logits are compared too; that computes with all weights in fp32.

    Returns:
        output, kind ("text", "ulvlm", "hlvlm"), tensors, and worst (of the logits; None without check).

    Raises:
        DataError: `output` exists, the model cannot be read, its tokenizer cannot be written as tokenizer.json, or the
            reloaded export is not the model. Nothing is left behind then.
        UsageError: no such shard size.
    """
    _check_shard_size(max_shard_size)
    output = Path(output)
    with atomic_folder(output) as folder:
        source = resolve_model(model)
        ours = _load(source, dtype)
        tokenizer = load_model_tokenizer(source)
        foreign = to_foreign(ours, tokenizer)
        before, kind = tensor_digests(foreign.model), foreign.kind
        _write(foreign, folder, max_shard_size)
        check_same(folder / "tokenizer.json", tokenizer)
        tokenizer.save(folder / "tokenizer")
        bases = [source, *getattr(ours, "places", {}).values()]
        notices = base_notices(bases, folder)
        facts = read_facts(source, fingerprint=model_fingerprint(source), tokenizer=tokenizer, config=ours.config)
        appended = foreign.appended
        write_card(folder, kind=kind, name=output.name, dtype=dtype, facts=facts, notices=notices, appended=appended)
        del foreign  # one model at a time from here on
        expected = our_logits(ours.float(), tokenizer) if check else None
        del ours
        again = load_foreign(folder, dtype=dtype)
        compare_tensors(before, tensor_digests(again.model), str(output))
        worst = None
        if expected is not None:
            again.model.float()
            worst = compare_logits(expected, their_logits(again), str(output))
    said = "logits not compared" if worst is None else f"logits differ by at most {worst:.1g} (allowed: {TOLERANCE:g})"
    say(f"{output}: {len(before)} tensors equal, {said}")
    return {"output": output, "kind": kind, "tensors": len(before), "worst": worst}


def next_steps(output: Path, kind: str) -> str:
    """What to do with an export, for the terminal."""
    lines = "\n".join(f"    {line}".rstrip() for line in snippet(kind, str(output)))
    return lines if kind == "text" else f"    megaprior caption {output} IMAGE...\n\nor in Python:\n\n{lines}"


def _load(source: Path, dtype: str) -> TextLM | HLVLM:
    if model_type(source) in KINDS:
        raise DataError(
            f"{source}: a two-tower model is saved as transformers' own CLIPModel and needs no export; use this folder as it is"
        )
    ours = load_model(source, dtype=dtype)
    assert isinstance(ours, TextLM | HLVLM)
    return ours


def _write(foreign: Foreign, folder: Path, max_shard_size: str) -> None:
    with quiet():
        foreign.model.save_pretrained(folder, max_shard_size=max_shard_size)
        foreign.processor.save_pretrained(folder)
    code = foreign.code()
    if code is not None:
        shutil.copyfile(code, folder / f"{PORTABLE}.py")


def _check_shard_size(text: str) -> None:
    from transformers.utils.hub import convert_file_size_to_int

    try:
        convert_file_size_to_int(text)
    except ValueError:
        raise UsageError(f"--max-shard-size {text}: write a number and KB, MB or GB, for example 5GB") from None
