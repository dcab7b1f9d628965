from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megaprior.errors import DataError
from megaprior.score.ledger import Ledger, Unit, plan_units

WORK = {"scorer": {"fingerprint": "aa", "dtype": "float32"}, "row_tokens": 64, "unit_tokens": 10}
RECORD = {"device": "one CPU", "threads": 1, "torch": "2.13.0"}


def test_a_unit_begins_with_the_first_sample_at_or_beyond_a_multiple() -> None:
    units = plan_units("00000", np.array([4, 4, 4, 9, 1, 30, 2], np.int32), unit_tokens=10, base=100)
    # samples start at tokens 0 4 8 | 12 | 21 22 | 52: in tens 0 0 0 | 1 | 2 2 | 5
    assert units == [
        Unit("00000", 0, 100, 0, 3, 12),
        Unit("00000", 1, 100, 3, 4, 9),
        Unit("00000", 2, 100, 4, 6, 31),
        Unit("00000", 3, 100, 6, 7, 2),
    ]
    assert units[3].file == "00000.000003.npy"
    assert plan_units("00000", np.zeros(0, np.int32), unit_tokens=10) == []


def test_units_are_split_back_into_samples(tmp_path: Path) -> None:
    counts = np.array([2, 3, 1, 4], np.int32)
    units = plan_units("00000", counts, unit_tokens=5)
    ledger = Ledger.open(tmp_path / ".score", work=WORK, record=RECORD)
    for unit in reversed(units):
        ledger.write(unit, np.arange(unit.tokens, dtype=np.float32) - 10 * unit.number)
    assert ledger.done() == {"00000.000000.npy", "00000.000001.npy"}
    samples = [part.tolist() for part in ledger.scores(units, counts)]
    assert samples == [[0, 1], [2, 3, 4], [-10], [-9, -8, -7, -6]]


def test_a_ledger_goes_on_with_the_same_work_only(tmp_path: Path) -> None:
    folder = tmp_path / ".score-r"
    Ledger.open(folder, work=WORK, record=RECORD)
    Ledger.open(folder, work=WORK, record=RECORD)
    other = WORK | {"scorer": {"fingerprint": "bb", "dtype": "float32"}}
    with pytest.raises(DataError, match=r"fingerprint: 'aa' then, 'bb' now.*--name, or delete"):
        Ledger.open(folder, work=other, record=RECORD, allow_other_hardware=True)
    with pytest.raises(DataError, match="row_tokens: 64 then, 128 now"):
        Ledger.open(folder, work=WORK | {"row_tokens": 128}, record=RECORD)


def test_other_hardware_is_refused_unless_asked_for_and_then_recorded(tmp_path: Path) -> None:
    folder = tmp_path / ".score-r"
    Ledger.open(folder, work=WORK, record=RECORD)
    other = RECORD | {"threads": 4}
    with pytest.raises(DataError, match=r"threads: 1 then, 4 now.*--allow-other-hardware"):
        Ledger.open(folder, work=WORK, record=other)
    ledger = Ledger.open(folder, work=WORK, record=other, allow_other_hardware=True)
    assert sorted(record["threads"] for record in ledger.records()) == [1, 4]
    Ledger.open(folder, work=WORK, record=other)  # now it is one of those that took part


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"\x80\x04pickle"])
def test_a_damaged_unit_is_refused_with_the_remedy(tmp_path: Path, damage) -> None:
    ledger = Ledger.open(tmp_path / ".score-r", work=WORK, record=RECORD)
    unit = Unit("00000", 0, 0, 0, 1, 8)
    ledger.write(unit, np.zeros(8, np.float32))
    path = ledger.folder / unit.file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"00000\.000000\.npy: unreadable .*delete this file"):
        ledger.read(unit)
    ledger.write(Unit("00000", 0, 0, 0, 1, 7), np.zeros(7, np.float32))
    with pytest.raises(DataError, match=r"holds float32 \[7\], expected float32 \[8\]"):
        ledger.read(unit)
