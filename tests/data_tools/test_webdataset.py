"""Real archives with real faults; the reader never writes a file."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.readers import webdataset
from megaprior.data_tools.readers.samples import Caption, Rejected, Sample
from megaprior.data_tools.readers.streams import open_input
from megaprior.data_tools.readers.tars import Archive
from megaprior.data_tools.readers.webdataset import read_tar

MakeTar = Callable[..., Path]
GOOD = [("0.jpg", b"J0"), ("0.txt", b"a dog\n"), ("1.jpg", b"J1"), ("1.txt", b"a cat\n")]


def read(path: Path, **options: object) -> list[Sample | Rejected]:
    with open_input(path) as opened:
        return list(read_tar(opened.stream, BuildOptions(**options)))  # type: ignore[arg-type]


def sample(key: str, text: str, image: bytes | None) -> Sample:
    return Sample(key=key, captions=(Caption(key=key, text=text),), image=image)


def write_infos(path: Path, infos: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_pairs_in_order(make_tar: MakeTar, name: str) -> None:
    assert read(make_tar(name, GOOD)) == [sample("0", "a dog", b"J0"), sample("1", "a cat", b"J1")]


def test_the_caption_list_of_the_json_gives_every_caption(make_tar: MakeTar) -> None:
    path = make_tar(
        "a.tar", [("0.jpg", b"J"), ("0.txt", b"one"), ("0.json", b'{"captions": ["one", "two"], "alt": "x"}')]
    )
    (found,) = read(path)
    assert isinstance(found, Sample)
    assert [(caption.key, caption.text) for caption in found.captions] == [("0#0", "one"), ("0#1", "two")]
    assert read(path, captions="first") == [sample("0", "one", b"J")]
    assert read(path, caption_column="alt") == [sample("0", "x", b"J")]


def test_words_come_from_the_json(make_tar: MakeTar) -> None:
    body = b'{"caption": "red dog", "words": [[0, 3, 1], [4, 7, 2]]}'
    (found,) = read(make_tar("a.tar", [("0.json", body), ("0.png", b"P"), ("0.txt", b"red dog\n")]))
    assert isinstance(found, Sample)
    assert found.captions == (Caption(key="0", text="red dog", words=((0, 3, 1), (4, 7, 2))),)


def test_keys_hold_their_folder_and_end_at_the_first_dot(make_tar: MakeTar) -> None:
    members = [
        ("./p/1.2.jpg", b"no image of this suffix"),
        ("./p/1.jpg", b"J"),
        ("./p/1.txt", b"dog"),
        ("q/1.JPG", b"K"),
        ("q/1.txt", b"cat"),
    ]
    assert read(make_tar("a.tar", members)) == [sample("p/1", "dog", b"J"), sample("q/1", "cat", b"K")]


def test_captions_alone_need_no_image_and_read_none(make_tar: MakeTar) -> None:
    path = make_tar("a.tar", [*GOOD, ("2.txt", b"a bird")])
    assert read(path, text=True) == [
        sample("0", "a dog", None),
        sample("1", "a cat", None),
        sample("2", "a bird", None),
    ]
    # a subset of captions is chosen by image, so that it fits a subset of pairs
    assert read(path, text=True, subset=(0.0, 0.5))[0] == sample("0", "a dog", b"J0")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.jpg", b"J")], "no caption: neither .txt nor .json beside .jpg"),
        ([("x.txt", b"dog")], "no image: only .txt; read are"),
        ([("x.txt", b"dog"), ("x.tiff", b"II*")], "no image: only .txt, .tiff; read are"),
        (
            [("x.json", b'{"caption": "d", "status": "failed_to_download"}')],
            "no image: only .json (status: failed_to_download)",
        ),
        ([("x.jpg", b"J"), ("x.png", b"P"), ("x.txt", b"dog")], "more than one image: .jpg, .png"),
        ([("x.jpg", b"J"), ("x.txt", b" \n")], "caption is blank"),
        ([("x.jpg", b"J"), ("x.txt", b"")], "caption is empty"),
        ([("x.jpg", b"J"), ("x.txt", b"caf\xe9")], "invalid UTF-8: byte 0xe9 at position 3"),
        ([("x.jpg", b"J"), ("x.txt", b"dog"), ("x.json", b"{")], "not JSON"),
        ([("x.jpg", b"J"), ("x.json", b'{"key": "1"}')], "no column 'caption'"),
    ],
)
def test_a_broken_sample_is_named_and_its_neighbours_survive(make_tar: MakeTar, members: list, reason: str) -> None:
    found = read(make_tar("a.tar", GOOD[:2] + members + GOOD[2:]))
    assert [item for item in found if isinstance(item, Sample)] == [
        sample("0", "a dog", b"J0"),
        sample("1", "a cat", b"J1"),
    ]
    (rejected,) = (item for item in found if isinstance(item, Rejected))
    assert rejected.key == "x"
    assert rejected.reason.startswith(reason)


@pytest.mark.parametrize("name", ["../2.jpg", "/etc/2.jpg", "a/../../2.jpg"])
def test_names_that_lead_out_of_the_archive(make_tar: MakeTar, name: str) -> None:
    found = read(make_tar("a.tar", [*GOOD[:2], (name, b"J"), *GOOD[2:]]))
    assert found == [
        Rejected(key=name, reason="unsafe name: it leads out of the archive"),
        sample("0", "a dog", b"J0"),
        sample("1", "a cat", b"J1"),
    ]


@pytest.mark.parametrize(
    ("type", "what"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.CHRTYPE, "device or unknown type"),
        (tarfile.BLKTYPE, "device or unknown type"),
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, type: bytes, what: str) -> None:
    info = tarfile.TarInfo("0.jpg")
    info.type, info.linkname = type, "/etc/passwd"
    caption = tarfile.TarInfo("0.txt")
    caption.size = 3
    first, second = read(write_infos(tmp_path / "a.tar", [info, caption]))
    assert first == Rejected(key="0.jpg", reason=f"not a file: {what}")
    assert isinstance(second, Rejected)
    assert second.reason.startswith("no image")


def test_folders_are_no_members_and_other_names_are_told(make_tar: MakeTar, tmp_path: Path) -> None:
    folder = tarfile.TarInfo("p/")
    folder.type = tarfile.DIRTYPE
    assert read(write_infos(tmp_path / "a.tar", [folder])) == []
    found = read(make_tar("b.tar", [("README", b"x"), ("._0.jpg", b"x"), *GOOD[:2]]))
    assert [item.key for item in found] == ["README", "._0.jpg", "0"]


def test_duplicates(make_tar: MakeTar) -> None:
    found = read(make_tar("a.tar", [*GOOD, ("0.jpg", b"other")]))
    assert found[0] == sample("0", "a dog", b"J0")
    assert Rejected(key="0.jpg", reason="duplicate key: an earlier sample has it; members must be neighbours") in found
    found = read(make_tar("b.tar", [GOOD[0], ("0.jpg", b"other"), GOOD[1]]))
    assert found == [
        Rejected(key="0.jpg", reason="duplicate member: the sample has one of that name"),
        sample("0", "a dog", b"J0"),
    ]


def test_a_member_too_large_is_not_read(make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_MEMBER_BYTES", 100)
    path = make_tar("a.tar", [("2.jpg", b"J" * 101), ("2.txt", b"big"), *GOOD])
    assert read(path)[0] == Rejected(key="2", reason="member too large: 2.jpg has 101 bytes, at most 100")


def test_an_archive_cut_at_any_block_loses_only_what_it_says(make_tar: MakeTar) -> None:
    path = make_tar("a.tar", GOOD)
    data = path.read_bytes()
    whole = read(path)
    for size in range(512, 9 * 512 + 1, 256):  # 4 members of a header and a block, then zeros
        path.write_bytes(data[:size])
        found = read(path)
        samples = [item for item in found if isinstance(item, Sample)]
        assert samples == whole[: len(samples)], size
        if size < 8 * 512 + 512:
            assert found[-1].key == "(end of archive)", size
            assert isinstance(found[-1], Rejected)
            assert found[-1].reason.startswith("damaged archive"), size
        else:
            assert found == whole


def test_a_broken_header_in_the_middle_is_no_silent_end(make_tar: MakeTar) -> None:
    path = make_tar("a.tar", GOOD)
    data = bytearray(path.read_bytes())
    data[4 * 512 + 3] ^= 1  # in the header of 1.jpg: its checksum fails
    path.write_bytes(data)
    assert read(path) == [
        Rejected(key="0", reason="damaged archive: it breaks off in or right after this sample"),
        Rejected(key="(end of archive)", reason="damaged archive: no end mark, so it is cut short or broken here"),
    ]


def test_a_gzipped_archive_cut_short(make_tar: MakeTar) -> None:
    noise = random.Random(0)
    path = make_tar("a.tar.gz", [(f"{i}.{kind}", noise.randbytes(3000)) for i in range(9) for kind in ("jpg", "txt")])
    path.write_bytes(path.read_bytes()[:20_000])
    found = read(path, text=True)
    assert isinstance(found[-1], Rejected)
    assert found[-1].reason.startswith("damaged archive: Compressed file ended before the end-of-stream marker")


def test_real_archives(shared: Callable[[str], Path], tmp_path: Path) -> None:
    path = shared("flickr8k_tars") / "00000.tar"
    found = read(path)
    assert len(found) == 600
    assert all(isinstance(item, Sample) and len(item.captions) == 5 for item in found)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[:1_000_000])
    some = read(cut)
    assert some[:-2] == found[: len(some) - 2]
    assert [item.key for item in some[-2:]] == [found[len(some) - 2].key, "(end of archive)"]


def described(members: Iterable[tuple[str, bytes]]) -> list[object]:
    """What an iteration gives, then the error that ends it."""
    found: list[object] = []
    try:
        found.extend(members)
    except (tarfile.TarError, ValueError) as error:
        found.append(str(error))
    return found


def by_tarfile(data: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
        for info in tar:
            file = None if info.isdir() or not info.isreg() else tar.extractfile(info)
            if not info.isdir():
                yield info.name, file.read() if file is not None else b""
        if data[tar.offset : tar.offset + 512] != bytes(512):
            raise tarfile.ReadError("no end mark, so it is cut short or broken here")


def by_archive(data: bytes) -> Iterator[tuple[str, bytes]]:
    archive = Archive(io.BytesIO(data))
    for member in archive:
        regular = member.info is None or member.info.isreg()
        yield member.name, archive.read(member) if regular else b""


def odd_archive(noise: random.Random) -> bytearray:
    """Some members of every kind and name, then a cut, a changed byte (its checksum often put right), or nothing."""
    form = noise.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    packed = io.BytesIO()
    kinds = [*[tarfile.REGTYPE] * 20, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, b"Z"]
    with tarfile.open(fileobj=packed, mode="w", format=form) as tar:
        for number in range(noise.randrange(1, 9)):
            name = f"{noise.choice(['', '', '', './', '/', '../', 'p/' * 60, 'é'])}{number}.jpg"
            info = tarfile.TarInfo(name + noise.choice(["", "", "", "", "/"]))
            info.type, info.size = noise.choice(kinds), noise.choice([0, 3, 512, 513, 70_000])
            info.mtime = noise.choice([1, 1, 1, 1.5])  # type: ignore[assignment]
            tar.addfile(info, io.BytesIO(noise.randbytes(info.size)))
    data = bytearray(packed.getvalue())
    place = noise.randrange(len(data) // 512) * 512
    change = noise.randrange(4)
    if change == 1:
        del data[place + noise.choice([0, 0, 1, 200]) :]
    elif change > 1:
        data[place + noise.choice([0, 99, 100, 107, 130, 135, 136, 147, 150, 155, 156, 257, 329, 345])] = noise.choice(
            b"\0 /07a"
        )
        if change == 3:
            data[place + 148 : place + 156] = b" " * 8
            data[place + 148 : place + 156] = b"%06o\0 " % (sum(data[place : place + 512]) % 8**6)
    return data


def test_plain_headers_read_here_are_what_tarfile_makes_of_them() -> None:
    for seed in range(400):
        data = bytes(odd_archive(random.Random(seed)))
        assert described(by_archive(data)) == described(by_tarfile(data)), seed


def test_a_size_beyond_any_disk_ends_at_once(make_tar: MakeTar) -> None:
    path = make_tar("a.tar", GOOD)
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + b"\x7f" * 11  # as GNU tar writes what eleven octal digits cannot hold
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert read(path)[-1] == Rejected(key="(end of archive)", reason="damaged archive: unexpected end of data")
