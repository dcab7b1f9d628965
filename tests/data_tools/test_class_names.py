"""ImageNet's folders and list of names as docs/data.md turns them into shards: its own lines are run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.cli import main
from megaprior.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
NAMES = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish, Carassius auratus", "n02124075": "Egyptian cat"}


def documented() -> str:
    """The script between `python - ... <<'END'` and `END`."""
    found = re.search(r"^    python - train .*<<'END'\n(.*?)^    END\n", PAGE.read_text(), re.M | re.S)
    assert found
    return re.sub("^    ", "", found[1], flags=re.M)


def test_class_folders_become_pairs_with_class_names(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer, picture: Callable[..., bytes]
) -> None:
    words = tmp_path / "synset_words.txt"
    words.write_text("".join(f"{name} {said}\n" for name, said in NAMES.items()))
    for place, name in enumerate(list(NAMES)[:2]):  # a list may name more classes than there are folders
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "train" / name / f"{name}_{number}.JPEG").write_bytes(picture(10 * place + number))
    (tmp_path / "classes").mkdir()
    command = [sys.executable, "-", "train", "synset_words.txt", "classes"]
    subprocess.run(command, input=documented(), text=True, cwd=tmp_path, check=True)
    output = tmp_path / "shards"
    inputs = ["--input", tmp_path / "classes", "--images", tmp_path / "train"]
    said = ["build", *inputs, "--output", output, "--tokenizer", tokenizer_folder, "--workers", "1"]
    assert main([str(argument) for argument in said]) == 0
    assert verify(output) == []
    shards = ShardSet.open(output)
    assert (shards.kind, len(shards), len(shards.shards)) == ("pairs", 6, 2)
    captions = [tokenizer.decode(shards.tokens(i)[:-1].tolist()) for i in range(len(shards))]
    assert captions == ["tench"] * 3 + ["goldfish"] * 3
    first = (tmp_path / "train" / "n01440764" / "n01440764_0.JPEG").read_bytes()
    assert bytes(shards.image(0)) == first
    assert first.startswith(b"\xff\xd8\xff")
