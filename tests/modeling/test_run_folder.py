"""A checkpoint is what was written, or it is refused in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.modeling.run_folder import Damaged, newest_first, read_state, seal, verify

FACTS = {"counters": {"step": 7, "loss": 0.1 + 0.2}, "ema_decays": [0.999], "latents": None}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "step-00000007"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_bytes(b"weights")
    (folder / "moments").write_bytes(b"moments")
    seal(folder, FACTS)
    return folder


def test_what_was_sealed_is_read_to_the_bit(tmp_path: Path) -> None:
    source = random.Random(0)
    numbers = [source.gauss(0, 1) * 10 ** source.randint(-300, 300) for _ in range(5000)]
    seal(tmp_path, {"numbers": [*numbers, 2**80, -0.0]})
    assert verify(tmp_path)["numbers"] == [*numbers, 2**80, -0.0]


@settings(max_examples=40)
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_state_with_another_byte_is_the_same_or_refused(
    checkpoint: Path, place: float, byte: int
) -> None:
    state = checkpoint / "state.json"
    before = state.read_bytes()
    altered = bytearray(before)
    altered[int(place * len(before))] = byte
    try:
        for content in (bytes(altered), before[: int(place * len(before))]):
            state.write_bytes(content)
            try:
                facts = read_state(checkpoint)
            except Damaged as refusal:
                assert str(checkpoint) in str(refusal) and "\n" not in str(refusal)
            else:
                assert {name: facts[name] for name in FACTS} == FACTS
    finally:
        state.write_bytes(before)


@pytest.mark.parametrize(
    "record",
    [
        *(None, [], {}, {"files": {}}, {"digest": "0", "files": {"a": 1}}),
        {"digest": "0", "files": {}, "history": [{"step": 1, "changed": {"steps": [1]}}]},
        {"digest": "0", "files": {}, "options": 3},
    ],
)
def test_a_state_that_is_no_record_is_refused(tmp_path: Path, record: object) -> None:
    (tmp_path / "state.json").write_text(json.dumps(record))
    with pytest.raises(Damaged, match=r"state\.json: ") as refusal:
        read_state(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_damaged_file_matters_to_the_part_that_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")
    (tmp_path / "moments").write_bytes(b"moments")
    seal(tmp_path, FACTS)
    (tmp_path / "moments").write_bytes(b"other")
    assert verify(tmp_path, "model")["counters"] == FACTS["counters"]
    with pytest.raises(Damaged, match="moments is damaged"):
        verify(tmp_path)


def test_only_folders_named_after_steps_count_newest_first(tmp_path: Path) -> None:
    for name in ("step-00000900", "step-00001000", "step-100000000", "step-1", "step-00000900.old"):
        (tmp_path / name).mkdir()
    names = [path.name for path in newest_first(tmp_path)]
    assert names == ["step-100000000", "step-00001000", "step-00000900"]
