"""`megaprior caption`: a model's own words for an image, each token coloured by how sure the model was of it.

Letters: T tokens of the prompt, n tokens of the caption, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaprior.data.images import decode_rgb
from megaprior.errors import DataError, UsageError
from megaprior.export.foreign import Foreign, load_foreign, to_foreign
from megaprior.models.folder import model_type
from megaprior.models.hlvlm import HLVLM
from megaprior.models.lm import TextLM
from megaprior.models.load import load_model
from megaprior.models.vision import KINDS
from megaprior.tokenizer import Tokenizer, load_model_tokenizer
from megaprior.train.checkpoint import resolve_model

if TYPE_CHECKING:
    from rich.console import Console

# (lowest probability, colour, in words), from the surest to the least sure.
_SHADES = (
    (0.9, "green", "above 0.9"),
    (0.5, "bright_green", "above 0.5"),
    (0.1, "yellow", "above 0.1"),
    (0.01, "dark_orange", "above 0.01"),
    (0.0, "red", "below"),
)


@dataclass(frozen=True)
class Caption:
    """What a model says about one image.

    Attributes:
        texts: what each token adds; a character spread over several tokens appears with the last of them.
        logprobs: of each token after the image and the tokens before it, natural log; the closing EOS last where it came.
        ended: whether EOS came, or the caption was cut.
    """

    texts: list[str]
    logprobs: list[float]
    ended: bool

    @property
    def text(self) -> str:
        """The caption."""
        return "".join(self.texts)


def caption(
    model: Path | str,
    images: Sequence[Path],
    *,
    max_tokens: int = 40,
    numbers: bool = False,
    console: Console | None = None,
) -> list[Caption]:
    """Print a greedy caption of each image.

    Args:
        model: an export, a run (its newest checkpoint), a checkpoint, or a model's folder.
        max_tokens: where a caption is cut.
        numbers: print the log-probability behind each token.
        console: where to print; None is standard output. Colours only on a terminal, and never under NO_COLOR.

    Raises:
        UsageError: `max_tokens` is below 1.
        DataError: an image cannot be read (none is captioned then), or the model is none that sees.
    """
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: a caption has at least 1 token")
    pictures = [_read(path) for path in images]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    foreign, tokenizer = open_captioner(model, dtype="bfloat16" if device == "cuda" else "float32")
    foreign.model.to(device)
    console = console or _console()
    found = []
    for path, picture in zip(images, pictures, strict=True):
        found.append(write_caption(foreign, tokenizer, picture, max_tokens=max_tokens))
        _show(console, path, found[-1], numbers)
    console.print(_legend(console, numbers))
    return found


def open_captioner(model: Path | str, *, dtype: str = "float32") -> tuple[Foreign, Tokenizer]:
    """The model in the class that an export of it has, with its processor; and its tokenizer.

    Raises:
        DataError: there is no such model, or it reads text only.
    """
    folder = resolve_model(model)
    if model_type(folder) in KINDS:
        raise DataError(f"{model}: a two-tower model compares images with captions and writes none")
    tokenizer = load_model_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():  # an export or a stock folder; ours keep theirs in tokenizer/
        foreign = load_foreign(folder, dtype=dtype)
    else:
        ours = load_model(folder, dtype=dtype)
        assert isinstance(ours, TextLM | HLVLM)
        foreign = to_foreign(ours, tokenizer)
    if foreign.kind == "text":
        raise DataError(f"{model}: a text-only model; give a vision-language model (stage ulvlm or hlvlm)")
    return foreign, tokenizer


@torch.inference_mode()
def write_caption(foreign: Foreign, tokenizer: Tokenizer, picture: Any, *, max_tokens: int) -> Caption:
    """The greedy caption of an RGB picture."""
    inputs = {name: tensor.to(foreign.model.device) for name, tensor in foreign.inputs(picture).items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(foreign.model.dtype)
    output = foreign.model.generate(
        **inputs, max_new_tokens=max_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new = output.sequences[0, inputs["input_ids"].shape[1] :]  # [n]
    logprobs = torch.stack(output.logits)[:, 0].float().log_softmax(-1)  # [n, V]
    ids = new.tolist()
    return Caption(
        texts=tokenizer.texts(ids),
        logprobs=logprobs.gather(1, new[:, None])[:, 0].tolist(),
        ended=ids[-1] == tokenizer.eos_id,
    )


def _read(path: Path) -> Any:
    try:
        return decode_rgb(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; give image files") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


# ---------------------------------------------------------------- the terminal


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _show(console: Console, path: Path, found: Caption, numbers: bool) -> None:
    from rich.text import Text

    mean = sum(found.logprobs) / len(found.logprobs)
    cut = "" if found.ended else ", cut"
    console.print(Text(f"{path}  ({len(found.logprobs)} tokens{cut}, mean log-probability {mean:.2f})", style="bold"))
    line = Text("  ")
    for at, (text, logprob) in enumerate(zip(found.texts, found.logprobs, strict=True)):
        last = found.ended and at == len(found.texts) - 1
        shown = "[end]" if last and (numbers or not found.text.strip()) else _visible(text)
        line.append(shown, style=_shade(logprob))
        if numbers:
            line.append(f"({logprob:.2f})", style="dim")
    console.print(line)


def _visible(text: str) -> str:
    """Control characters as symbols: a caption is shown, never obeyed by the terminal."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _shade(logprob: float) -> str:
    return next(colour for low, colour, _ in _SHADES if logprob >= torch.tensor(low).log().item())


def _legend(console: Console, numbers: bool) -> Any:
    from rich.text import Text

    if not console.is_terminal or console.no_color:
        said = "in brackets" if numbers else "--numbers prints"
        return Text(f"{said}: the log-probability of each token; on a terminal it is its colour")
    line = Text("each token by its probability p: ")
    for _, colour, words in _SHADES:
        line.append(f"{words}  ", style=colour)
    return line
