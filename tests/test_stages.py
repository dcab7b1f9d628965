"""Every stage of the paper from the output of the one before, each by the configuration that ships; only paths, steps and the
sizes of data differ. What the tests of the rooms prove piece by piece is here one chain.

    text LM -> reference -> scores -> U-LVLM: class names -> PRIOR with the language mix -> conversations
                                      tower -> H-LVLM: PRIOR -> conversations -> export
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from megaprior.cli import main
from megaprior.data_tools.cli import main as data_main
from megaprior.models.load import load_model
from megaprior.train.checkpoint import resolve_model

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"
pytestmark = pytest.mark.slow


class Stages:
    """The commands of a chain, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self, name: str, source: Path, *options: object) -> None:
        """Shards NAME from `source`."""
        self.data(
            "build",
            "--input",
            source,
            "--output",
            self.shards(name),
            "--tokenizer",
            self.folder / "tokenizer",
            *options,
        )

    def data(self, *arguments: object) -> None:
        """One `megaprior-data` command."""
        assert data_main([str(argument) for argument in arguments]) == 0

    def shards(self, name: str) -> Path:
        """Where the shards NAME are."""
        return self.folder / "shards" / name

    def train(self, stage: str, *overrides: str, steps: int, of: str, out: str | None = None) -> Path:
        """Train launch/configs/STAGE.yaml on the shards `of`, from the runs of this chain where the file names runs/..."""
        run = self.folder / (out or stage)
        moved = [
            f"out={run}",
            f"data.train.0.path={self.shards(of)}",
            f"steps={steps}",
            f"save_every={steps}",
            "data.batch_size=16",
        ]
        short = [] if "instruct" in stage else ["optim.warmup_steps=2"]
        assert main(["train", str(CONFIGS / f"{stage}.yaml"), *moved, *short, *overrides]) == 0
        return run


def losses(run: Path) -> list[float]:
    """Mean NLL of the loss tokens of each step, before its update."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["ntp_loss"] for line in lines if line["kind"] == "train"]


def talks_about_scenes(probe: Path, path: Path) -> Path:
    """Two questions about each picture of a probe, as LLaVA's json."""
    records = []
    for item in map(json.loads, (probe / "probe.jsonl").read_text().splitlines()):
        turns = [("human", f"<image>\nIs it so? {item['true']}"), ("gpt", "yes, that is what can be seen here")]
        turns += [("human", f"And this? {item['false']}"), ("gpt", f"no, the {item['attribute']} is another one")]
        records.append({"image": item["image"], "conversations": [{"from": who, "value": text} for who, text in turns]})
    path.write_text(json.dumps(records))
    return path


def class_folders(folder: Path) -> Path:
    """A table of JPEGs with their class names, as docs/data.md writes it."""
    rows = ["image\tcaption"]
    for name, colour in (("red", (200, 20, 20)), ("green", (20, 180, 30)), ("blue", (20, 30, 200))):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (48, 32), tuple(min(255, c + 3 * number) for c in colour)).save(
                folder / name / f"{number}.JPEG"
            )
            rows.append(f"{name}/{number}.JPEG\t{name} square")
    (folder / "classes.tsv").write_text("\n".join(rows) + "\n")
    return folder / "classes.tsv"


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Data, text LM, reference and scores."""
    chain = Stages(tmp_path_factory.mktemp("stages"))
    scenes = chain.folder / "scenes"
    counts = {"pairs": 160, "heldout": 4, "reference": 300, "text": 300, "probe": 96, "tower": 96}
    chain.data("make-scenes", "--output", scenes, *(word for name, n in counts.items() for word in (f"--{name}", n)))
    corpus = [scenes / "text.txt.gz", scenes / "reference.txt.gz"]
    chain.data("train-tokenizer", "--input", *corpus, "--output", chain.folder / "tokenizer", "--vocab-size", 600)
    chain.build("text", corpus[0])
    chain.build("reference", corpus[1])
    for name in ("pairs", "tower"):
        chain.build(name, scenes / name)
    chain.build("imagenet", class_folders(chain.folder / "images"))
    talks = talks_about_scenes(scenes / "probe", scenes / "probe" / "talks.json")
    chain.build("instruct", talks, "--turns", "all", "--images", scenes / "probe")
    text = chain.train("textlm_tiny", of="text", steps=40)
    reference = chain.train("reference_tiny", f"model.init={text}", of="reference", steps=20)
    assert main(["score", "--model", str(reference), "--shards", str(chain.shards("pairs"))]) == 0
    return chain


@pytest.fixture(scope="module")
def ulvlm(stages: Stages) -> Path:
    """The U-LVLM after class names and after captions with the language mix."""
    warm_up = stages.train("ulvlm_imagenet_tiny", f"model.init={stages.folder / 'textlm_tiny'}", of="imagenet", steps=5)
    mix = f"data.text.0.path={stages.shards('text')}"
    return stages.train("ulvlm_prior_tiny", f"model.init={warm_up}", mix, of="pairs", steps=8)


def test_the_ulvlm_learns_to_answer_in_twenty_steps(stages: Stages, ulvlm: Path) -> None:
    first = json.loads((ulvlm / "metrics.jsonl").read_text().splitlines()[0])
    assert first["source1_share"] > 0.2, "text beside the pairs"
    assert first["sum_g"] == pytest.approx(first["loss_tokens"], rel=1e-4), "weights average 1"
    tuned = stages.train("instruct_ulvlm_tiny", f"model.init={ulvlm}", of="instruct", steps=20)
    found = losses(tuned)
    assert sum(found[-3:]) / 3 < 0.7 * found[0]


def test_the_hlvlm_learns_to_answer_in_twenty_steps_and_leaves(stages: Stages, tmp_path: Path) -> None:
    text = f"model.init={stages.folder / 'textlm_tiny'}"
    tower = stages.train("clip_tiny", of="tower", steps=8)
    captions = stages.train("hlvlm_prior_tiny", text, f"model.tower.init={tower}", of="pairs", steps=8)
    again = ("model.tower.init=null", f"model.init={captions}")
    tuned = stages.train("instruct_hlvlm_tiny", *again, of="instruct", steps=20)
    found = losses(tuned)
    assert sum(found[-3:]) / 3 < 0.7 * found[0]
    with_mlp_alone = stages.train(
        "instruct_hlvlm_tiny", *again, "model.trains=projector", of="instruct", steps=20, out="mlp"
    )
    assert losses(with_mlp_alone)[0] == found[0], "the same model on the same batch"
    assert sum(found[-3:]) < sum(losses(with_mlp_alone)[-3:]), (
        "a language model learns a new task better than what stands before it"
    )
    # The tower may be named too; another one is refused.
    assert main(["export", str(tuned), "--output", str(tmp_path / "export")]) == 0
    ours, theirs = load_model(resolve_model(tuned)), json.loads((tmp_path / "export" / "config.json").read_text())
    assert theirs["model_type"] == "llava"
    assert theirs["text_config"]["vocab_size"] == ours.config.text_config.vocab_size


def test_prior_on_conversations_needs_their_scores(
    stages: Stages, ulvlm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = shutil.copytree(stages.shards("instruct"), stages.shards("scored"))
    command = [
        "train",
        str(CONFIGS / "instruct_ulvlm_tiny.yaml"),
        f"model.init={ulvlm}",
        "weighting.kind=prior",
        "steps=2",
    ]
    command += [f"data.train.0.path={scored}", "data.batch_size=8", f"out={stages.folder / 'weighted'}"]
    assert main(command) == 65
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("megaprior: error: ")
    assert main(["score", "--model", str(stages.folder / "reference_tiny"), "--shards", str(scored)]) == 0
    assert main(command) == 0
    first = json.loads((stages.folder / "weighted" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["sum_g"] == pytest.approx(first["loss_tokens"], rel=1e-4)
    assert first["loss"] != pytest.approx(first["ntp_loss"], rel=1e-4)


def test_real_questions(stages: Stages, ulvlm: Path, shared: Callable[[str], Path], tmp_path: Path) -> None:
    """easy-VQA: a dozen questions a picture, answered in a word."""
    source = shared("easy_vqa")
    asked: dict[str, list[tuple[str, str]]] = defaultdict(list)
    with gzip.open(source / "train_questions.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            asked[record["image"]].append((record["question"], record["answer"]))
    with tarfile.open(source / "train_images.tar.gz") as tar:
        tar.extractall(
            tmp_path / "images", members=[m for m in tar if m.isfile() and int(Path(m.name).stem) < 200], filter="data"
        )
    records = []
    for picture in sorted(path.name for path in (tmp_path / "images").iterdir()):
        said = [
            {"role": who, "content": text}
            for turn in asked[picture]
            for who, text in zip(("user", "assistant"), turn, strict=True)
        ]
        records.append(json.dumps({"image": picture, "messages": said}))
    (tmp_path / "talks.jsonl").write_text("\n".join(records) + "\n")
    stages.build("easy_vqa", tmp_path / "talks.jsonl", "--turns", "all", "--images", tmp_path / "images")
    tuned = stages.train("instruct_ulvlm_tiny", f"model.init={ulvlm}", of="easy_vqa", steps=20, out="answers")
    found = losses(tuned)
    assert sum(found[-3:]) / 3 < 0.5 * found[0]
