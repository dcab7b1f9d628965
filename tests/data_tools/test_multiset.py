"""Whatever is done to sets of samples, in whatever order and however often it is killed: nothing is lost, nothing doubled."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image

from megaprior.data.shards import ShardSet, verify
from megaprior.data_tools.building.build import build
from megaprior.data_tools.options import BuildOptions
from megaprior.data_tools.sets.merging import Request as Merge
from megaprior.data_tools.sets.merging import merge
from megaprior.data_tools.sets.sides import parse_subsets
from megaprior.data_tools.sets.splitting import Request as Split
from megaprior.data_tools.sets.splitting import split
from megaprior.errors import DataError
from megaprior.tokenizer import train_sentencepiece
from tests.data_tools.sets import add_scores, check_scores, samples_of
from tests.data_tools.test_crashes import in_child

Samples = Counter[tuple[bytes, str]]
# A kill just before this step of those that touch the disk (None: left alone); then the same command again.
_DEATH = st.one_of(st.none(), st.integers(1, 250))


def _pictures(count: int) -> list[bytes]:
    found = []
    for seed in range(count):
        file = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 32), Image.Resampling.BICUBIC).save(file, "PNG")
        found.append(file.getvalue())
    return found


class Sets(RuleBasedStateMachine):
    """Folders of samples, and what each must hold; every rule may be killed on its way and is then repeated."""

    @initialize()
    def begin(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        self.sets: dict[Path, Samples] = {}
        self.scored: set[Path] = set()
        self.number = 0
        self.pictures = _pictures(6)
        self.fsync, os.fsync = os.fsync, lambda handle: None  # a killed process loses nothing that it has written
        words = [f"{n} dogs beside a red star" for n in range(60)]
        self.tokenizer = self.place / "tokenizer"
        train_sentencepiece(words, self.tokenizer, vocab_size=300)

    def teardown(self) -> None:
        if hasattr(self, "place"):
            os.fsync = self.fsync
            shutil.rmtree(self.place)

    def _new(self) -> Path:
        self.number += 1
        return self.place / f"set{self.number}"

    def _until_done(self, work: Callable[[], Any], deaths: list[int | None]) -> None:
        for death in deaths:
            if death is not None:
                in_child(work, die_at=death)
        work()

    @rule(
        pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=10),
        tars=st.integers(1, 2),
        deaths=st.lists(_DEATH, max_size=2),
        scored=st.booleans(),
    )
    def build(self, pairs: list[tuple[int, int]], tars: int, deaths: list[int | None], scored: bool) -> None:
        output, expected = self._new(), Counter[tuple[bytes, str]]()
        folder = self.place / f"in{self.number}"
        folder.mkdir()
        for at in range(tars):
            with tarfile.open(folder / f"{at}.tar", "w") as tar:
                for number, (picture, caption) in enumerate(pairs[at::tars] or [(0, 0)]):
                    text = f"{caption} dogs".encode()
                    for name, data in ((".png", self.pictures[picture]), (".txt", text)):
                        # keys tell sets apart: two folders with the very same shard are refused
                        info = tarfile.TarInfo(f"{self.number}_{number:03d}{name}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    expected[text, hashlib.sha256(self.pictures[picture]).hexdigest()] += 1
        self._until_done(lambda: build([folder], output, tokenizer=self.tokenizer, options=BuildOptions()), deaths)
        self.sets[output] = expected
        if scored:
            add_scores(output)
            self.scored.add(output)

    @precondition(lambda self: len(getattr(self, "sets", ())) >= 2)
    @rule(draw=st.data(), deaths=st.lists(_DEATH, max_size=2), link=st.booleans(), keys=st.booleans())
    def merge(self, draw: st.DataObject, deaths: list[int | None], link: bool, keys: bool) -> None:
        chosen = draw.draw(st.lists(st.sampled_from(sorted(self.sets)), min_size=2, max_size=3, unique=True))
        output = self._new()
        work = Merge(folders=tuple(chosen), output=output, link=link, prefix_keys=keys)
        self._until_done(lambda: merge(work), deaths)
        self._replace(chosen, [output], sum((self.sets[one] for one in chosen), Counter()))

    @precondition(lambda self: bool(getattr(self, "sets", ())))
    @rule(draw=st.data(), deaths=st.lists(_DEATH, max_size=2), share=st.sampled_from([0.2, 0.5, 0.8]))
    def split(self, draw: st.DataObject, deaths: list[int | None], share: float) -> None:
        source = draw.draw(st.sampled_from(sorted(self.sets)))
        output = self._new()
        near = draw.draw(st.sampled_from([0, 6]))
        subsets = parse_subsets([f"a={share}", "b=rest"])
        work = Split(source=source, output=output, subsets=subsets, near_bits=near)
        if not all(subset["samples"] for subset in split(work, dry_run=True)["subsets"]):
            with pytest.raises(DataError, match="no sample would fall to it"):  # one group alone is on one side
                split(work)
            return
        self._until_done(lambda: split(work), deaths)
        sides = [output / "a", output / "b"]
        one, other = ({image for _, image in samples_of(side)} for side in sides)
        assert not one & other
        self._replace([source], sides, self.sets[source])

    def _replace(self, old: list[Path], new: list[Path], expected: Samples) -> None:
        assert samples_of(*new) == expected
        for path in new:
            if all(one in self.scored for one in old):
                check_scores(path)
                self.scored.add(path)
            self.sets[path] = samples_of(path)
        for path in old:
            del self.sets[path]
            shutil.rmtree(path)  # a link holds what is left of it

    @invariant()
    def every_set_is_whole(self) -> None:
        for folder, expected in getattr(self, "sets", {}).items():
            assert verify(folder) == []
            assert len(ShardSet.open(folder)) == expected.total()


TestSets = Sets.TestCase
TestSets.settings = settings(
    max_examples=15, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)
