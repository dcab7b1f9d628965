"""LLaVA and chat conversations: which is a caption, where the loss lies, and which image they are about."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.building.plan import make_plan
from megaprior.data_tools.building.sharding import conversation_tokens, read_job
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers.conversations import as_record, parse_conversation
from megaprior.data_tools.readers.samples import Rejected, Sample, Turn, Unfit
from megaprior.errors import DataError, UsageError
from megaprior.tokenizer import Tokenizer


def llava(*values: str) -> list[dict]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def write(path: Path, records: list) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records))
    return path


def read(path: Path, **options: Any) -> list[Sample | Rejected]:
    plan = make_plan([path], BuildOptions(**options), fingerprint="t")
    return [item for job in plan.jobs for item in read_job(job, plan.options, lambda _: None)]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (llava("<image>\nWhat?", "A dog."), [("What?", False), ("A dog.", True)]),
        (llava("What?\n<image>", "An <image>."), [("What?", False), ("An <image>.", True)]),
        (llava("<image>", "A dog."), [("A dog.", True)]),
        (llava("<image> Q", " a ", "Q2", "a2"), [("Q", False), ("a", True), ("Q2", False), ("a2", True)]),
        ([{"from": "system", "value": "Be brief."}, *llava("Q", "a")], [("Be brief.", False), ("Q", False), ("a", True)]),
        ([{"role": "assistant", "content": "A dog."}], [("A dog.", True)]),
        (
            [{"role": "User", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "R"}]},
             {"role": "Assistant", "content": [{"type": "text", "text": "a"}]}],
            [("Q\nR", False), ("a", True)],
        ),
    ],
)  # fmt: skip
def test_turns_in_order_and_placeholders_out_of_prompts(turns: list, expected: list[tuple[str, bool]]) -> None:
    assert parse_conversation(turns).turns == tuple(Turn(text=text, loss=loss) for text, loss in expected)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (llava("Q"), "no answer: no turn is by gpt or assistant"),
        (llava("Q", " "), "caption is empty"),
        (llava("<image> and <image>", "a"), "more than one image: 2 times <image>"),
        ([*llava("Q", "a"), "text"], "turn 2 is a string, expected an object"),
        ([{"from": "narrator", "value": "x"}], "turn 0 is by 'narrator'"),
        ([{"value": "x"}], "turn 0 is by 'None'"),
        ([{"from": "gpt", "value": None}], "turn 0 says null"),
        (
            [{"role": "assistant", "content": [{"type": "audio"}]}],
            "a part of turn 0 is neither text nor image: 'audio'",
        ),
        ([{"role": "assistant", "content": ["x"]}], "a part of turn 0 is neither text nor image: None"),
        (llava("Q", "a\0b"), "NUL character"),
    ],
)
def test_shapes_that_are_no_conversation(turns: list, reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        parse_conversation(turns)


PNG = base64.b64encode(b"\x89PNG" + bytes(40)).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}},
        {"type": "image_url", "image_url": {"url": PNG}},
        {"type": "image_url", "image_url": PNG},
        {"type": "image", "image": f"data:;base64,{PNG[:20]}\n{PNG[20:]}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
    ],
)
@pytest.mark.parametrize(
    "wrap", [lambda m: {"messages": m}, lambda m: m, lambda m: m[0], lambda m: {"conversations": m}]
)
def test_messages_bring_their_image_as_base64(tmp_path: Path, part: dict, wrap: Callable[[list], Any]) -> None:
    """The shapes in which SOLO's scripts write: a record, its list alone, one message alone."""
    messages = [{"role": "assistant", "content": [part, {"type": "text", "text": "A dog."}]}]
    (found,) = read(write(tmp_path / "a.jsonl", [wrap(messages)]))
    assert isinstance(found, Sample)
    assert (found.key, found.image, found.captions[0].text) == ("line 1", b"\x89PNG" + bytes(40), "A dog.")


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (["https://x/1.jpg"], "image is a URL: nothing is ever downloaded"),
        (["data:image/png,%89PNG"], "image is no base64: a data URL beginning 'data:image/png'"),
        (["photos/1.jpg"], "image is no base64: "),
        (["photos/12.jpg"], "image is no base64: "),  # without its full stop it would decode
        ([PNG[:-1]], "image is no base64: "),
        ([PNG, PNG], "more than one image: 2 in the conversation"),
        ([], "no image name: null"),
        ([None], "no image name: null"),
    ],
)
def test_messages_without_one_image_go_to_quarantine(tmp_path: Path, images: list, reason: str) -> None:
    def record(values: list) -> dict:
        parts = [{"type": "image_url", "image_url": {"url": value} if value else None} for value in values]
        return {"messages": [{"role": "assistant", "content": [*parts, {"type": "text", "text": "A dog."}]}]}

    good, bad = read(write(tmp_path / "a.jsonl", [record([PNG]), record(images)]))
    assert isinstance(good, Sample)
    assert isinstance(bad, Rejected)
    assert bad.reason.startswith(reason)


def test_llava_images_stay_inside_their_folder(tmp_path: Path) -> None:
    """FAULTS 40."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"A")
    (tmp_path / "secret.jpg").write_bytes(b"S")
    names = ["a.jpg", "../secret.jpg", str(tmp_path / "secret.jpg"), "gone.jpg", None]
    records = [{"id": "1", "image": name, "conversations": llava("<image>", "A dog.")} for name in names]
    del records[-1]["image"]  # LLaVA's mixes hold conversations about no image
    first, *refused = read(write(tmp_path / "a.json", records))
    assert isinstance(first, Sample)
    assert first.image == b"A"
    assert [item.reason[:26] for item in refused if isinstance(item, Rejected)] == [
        "unsafe image name: '../sec",
        f"unsafe image name: '{tmp_path}"[:26],
        "no image: 'gone.jpg' is no",
        "no image name: null",
    ]
    assert [item.key for item in refused] == ["item 1", "item 2", "item 3", "item 4"]
    with pytest.raises(DataError, match=r"its first image 'gone.jpg' is neither beside it nor in images/"):
        read(write(tmp_path / "b.json", records[3:]))


def test_a_mixture_may_begin_without_an_image(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"A")
    records = [{"conversations": llava("Q", "a")}, {"image": "a.jpg", "conversations": llava("<image>", "b")}]
    first, second = read(write(tmp_path / "a.json", records))
    assert first == Rejected(key="item 0", reason="no image name: null")
    assert isinstance(second, Sample)
    assert second.image == b"A"


def test_where_messages_come_from_makes_no_list_of_urls(tmp_path: Path) -> None:
    content = [{"type": "image", "image": PNG}, {"type": "text", "text": "A dog."}]
    record = {"messages": [{"role": "assistant", "content": content}], "source": "https://x/page.html"}
    (found,) = read(write(tmp_path / "a.jsonl", [record]))
    assert isinstance(found, Sample)


def test_several_turns_need_a_decision(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json", [{"conversations": llava("Q", "a")}, {"conversations": llava("Q", "a", "R", "b")}]
    )
    one, two = read(path, text=True)
    assert isinstance(one, Sample)
    assert one.captions[0].text == "a"
    assert two == Rejected(
        key="item 1",
        reason="several turns: 2 answers, a caption is one; --turns all builds conversations whole",
    )
    one, two = read(path, text=True, turns="all")
    assert [item.captions[0].text for item in (one, two) if isinstance(item, Sample)] == ["Q\na", "Q\na\nR\nb"]
    with pytest.raises(UsageError, match="--turns all builds conversations whole, --documents cuts text"):
        BuildOptions(turns="all", documents=True)
    (tmp_path / "a.txt").write_text("dog\n")
    with pytest.raises(UsageError, match="--turns all: no input holds conversations"):
        make_plan([tmp_path / "a.txt"], BuildOptions(turns="all"), fingerprint="t")


def test_the_loss_lies_on_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    turns = parse_conversation(llava("one red", "square", "two", "dogs", "blue")).turns
    ids, spans = conversation_tokens(tokenizer, turns)
    encode, eos = tokenizer.encode, tokenizer.eos_id
    pieces = [encode("one red\n"), [*encode("square"), eos], encode("two\n"), [*encode("dogs"), eos]]
    assert ids == [token for piece in pieces for token in piece]  # the prompt that nobody answered is left out
    assert [ids[start:end] for start, end in spans] == [pieces[1], pieces[3]]


def test_whole_conversations_through_a_build(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(picture(1))
    talks = [llava("<image>\none", "red"), llava("one", "red", "two", "blue circle star"), llava("a star " * 40, "red")]
    records = [{"image": "a.jpg", "conversations": talk} for talk in talks]
    path, output = write(tmp_path / "a.json", records), tmp_path / "out"
    limit = len(conversation_tokens(tokenizer, parse_conversation(talks[1]).turns)[0]) - 2
    options = BuildOptions(turns="all", max_sequence=limit)
    body = build([path], output, tokenizer=tokenizer_folder, options=options)
    assert verify(output) == []
    shards = ShardSet.open(output)
    assert (len(shards), body["counts"]["images"], body["counts"]["truncated"]) == (2, 1, 1)
    for index, talk in enumerate(talks[:2]):
        ids, spans = conversation_tokens(tokenizer, parse_conversation(talk).turns)
        assert shards.tokens(index).tolist() == ids[:limit]
        found = shards.loss_spans(index)
        assert found is not None
        assert found.tolist() == [[start, min(end, limit)] for start, end in spans]
    counts = body["counts"]
    assert 0 < counts["loss_tokens"] < counts["tokens"]
    refused = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [(entry["sample"], entry["reason"].split(":")[0]) for entry in refused] == [
        ("item 2", "no answer within --max-sequence")
    ]


def test_captions_beside_conversations_have_loss_everywhere(tmp_path: Path, tokenizer_folder: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"conversations": llava("one", "red")}, {"caption": "a red square"}])
    build([path], tmp_path / "out", tokenizer=tokenizer_folder, options=BuildOptions(turns="all", text=True))
    shards = ShardSet.open(tmp_path / "out")
    spans = shards.loss_spans(1)
    assert spans is not None
    assert spans.tolist() == [[0, len(shards.tokens(1))]]


def test_a_record_around_bare_messages() -> None:
    message = {"role": "assistant", "content": "x"}
    assert as_record(message) == as_record([message]) == {"messages": [message]}
    assert as_record([1]) == [1]
    assert as_record({"caption": "x", "role": "y"}) == {"caption": "x", "role": "y"}


def test_an_answer_that_begins_where_the_sequence_ends_has_no_span(
    tmp_path: Path, tokenizer_folder: Path, tokenizer: Tokenizer
) -> None:
    talk = llava("one", "red", "two", "blue circle star")
    _, spans = conversation_tokens(tokenizer, parse_conversation(talk).turns)
    path, limit = write(tmp_path / "a.json", [{"conversations": talk}]), spans[1][0]
    options = BuildOptions(turns="all", text=True, max_sequence=limit)
    build([path], tmp_path / "out", tokenizer=tokenizer_folder, options=options)
    shards = ShardSet.open(tmp_path / "out")
    found = shards.loss_spans(0)
    assert found is not None
    assert (len(shards.tokens(0)), found.tolist()) == (limit, [list(spans[0])])
