"""The verbs `export`, `caption` and `import` of the command `megaprior`: what leaves it, and what enters."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

Verb = Callable[..., argparse.ArgumentParser]

_EXPORT = """\
write a trained model as a folder that Hugging Face's transformers loads, and prove that it is the same model:

  text LM, reference   LlamaForCausalLM and a tokenizer
  U-LVLM               a class of its own in one Python file of the folder (trust_remote_code=True), and its processor
  H-LVLM               LlavaForConditionalGeneration and LlavaProcessor; the prompt is <image>

The folder is reloaded before it gets its name: every tensor is compared by digest, the logits of a fixed row within 1e-4 in
float32, and the tokenizer by fingerprint. What differs is an error, and no folder is left.
"""
_IMPORT = """\
turn a folder of a known kind into starting points for training, safetensors only, every tensor accounted for:

  Llama, U-LVLM        OUTPUT                     model.init=OUTPUT
  CLIP                 OUTPUT                     model.tower.init=OUTPUT
  LLaVA                OUTPUT/lm, OUTPUT/tower    model.init=OUTPUT/lm model.tower.init=OUTPUT/tower
                       OUTPUT/hlvlm               model.init=OUTPUT/hlvlm, with the MLP that LLaVA was trained with
"""


def add_export(verb: Verb) -> None:
    """`megaprior export`."""
    parser = verb(
        "export",
        _export,
        "write a trained model as a folder that Hugging Face's transformers loads, and prove that it is the same model",
        "megaprior export runs/prior --output exports/prior",
    )
    parser.description = _EXPORT
    parser.add_argument("model", type=Path, metavar="MODEL", help="a run folder, a checkpoint, or a model's folder")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make; it must not exist")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the saved weights (default: float32)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of one safetensors file (default: 5GB)")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="compare tensors only, not logits: those take memory for all weights in float32",
    )


def _export(options: argparse.Namespace) -> int:
    _no_deepspeed()
    from megaprior.export import export
    from megaprior.export.writing import next_steps

    done = export(
        options.model,
        options.output,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        check=not options.no_check,
    )
    print(f"{options.output}\n\nnext:\n\n{next_steps(options.output, done['kind'])}")
    return 0


def add_caption(verb: Verb) -> None:
    """`megaprior caption`."""
    parser = verb(
        "caption",
        _caption,
        "print a model's caption of each image, its tokens coloured by log-probability",
        "megaprior caption exports/prior photo.jpg other.png",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="an export, a run folder, a checkpoint, or a model's folder"
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, GIF or BMP files")
    parser.add_argument("--max-tokens", type=int, default=40, help="where a caption is cut (default: 40)")
    parser.add_argument("--numbers", action="store_true", help="print each token's log-probability behind it")


def _caption(options: argparse.Namespace) -> int:
    from megaprior.caption import caption

    caption(options.model, options.images, max_tokens=options.max_tokens, numbers=options.numbers)
    return 0


def add_import(verb: Verb) -> None:
    """`megaprior import`."""
    parser = verb(
        "import",
        _import,
        "turn a Llama, CLIP or LLaVA folder, or an export of ours, into starting points for training",
        "megaprior import llava-1.5-7b-hf --output bases/llava",
    )
    parser.description = _IMPORT
    parser.add_argument("model", type=Path, metavar="FOLDER", help="a Hugging Face folder with safetensors weights")
    parser.add_argument("--output", type=Path, required=True, help="the folder to make; it must not exist")


def _import(options: argparse.Namespace) -> int:
    _no_deepspeed()
    from megaprior.importing import import_model

    done = import_model(options.model, options.output)
    print("\n".join([str(options.output), "", "start from it with:", "", *(f"    {line}" for line in done.lines)]))
    return 0


def _no_deepspeed() -> None:
    """transformers imports DeepSpeed when it saves, and that prints that it found no accelerator, unless it was told."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
