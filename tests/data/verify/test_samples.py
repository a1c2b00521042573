"""What no checksum can tell is found by encoding a few clips again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.shards.format import Example, Manifest, ShardTable
from vidfill.data.storage.names import MANIFEST
from vidfill.data.verify.samples import choose_samples

Latents = np.ndarray


def with_latents(change: Callable[[Latents], Latents]) -> Callable[[Example], Example]:
    return lambda example: dataclasses.replace(
        example, latents=change(example.latents), masked_latents=change(example.masked_latents)
    )


def turn(example: Example) -> Example:
    """As the clip of a video that was mirrored."""
    turned = {
        name: np.ascontiguousarray(getattr(example, name)[..., ::-1])
        for name in ("latents", "masked_latents", "mask")
    }
    return dataclasses.replace(example, **turned)


CHANGES = {
    "mirrored": turn,
    "scaled twice": with_latents(lambda latents: latents * np.float16(0.5)),
    "not scaled": with_latents(lambda latents: latents * np.float16(2)),
    "swapped": lambda e: dataclasses.replace(e, latents=e.masked_latents, masked_latents=e.latents),
    "nothing masked": lambda e: dataclasses.replace(e, masked_latents=e.latents),
    "inverted mask": lambda e: dataclasses.replace(e, mask=1 - e.mask),
    "another mask": lambda e: dataclasses.replace(e, mask=np.roll(e.mask, 3, axis=0)[..., ::-1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_examples_that_encoding_does_not_give_are_found_by_encoding_them(
    dataset: Path,
    find: Callable[..., tuple[dict[str, int], str]],
    rewrite: Callable[..., None],
    change: Callable[[Example], Example],
) -> None:
    rewrite(dataset, change)
    assert find(dataset, split="train") == ({}, "")  # all checksums and sums are consistent
    bad, said = find(dataset, split="train", samples=2)
    assert bad == {"encoded again": 2}
    assert "encoded again it differs: latents by" in said


@settings(max_examples=20, deadline=None)
@given(
    examples=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(sum),
    count=st.integers(0, 20),
)
def test_samples_are_different_examples_of_the_split(
    pristine: Path, examples: list[int], count: int
) -> None:
    manifest = Manifest.from_json((pristine / "train" / MANIFEST).read_bytes())
    shards = len(examples)
    table = ShardTable(tuple(examples), (0,) * shards, ("0" * 64,) * shards)
    rows = choose_samples(
        dataclasses.replace(manifest, shards=table, examples=sum(examples)), count
    )
    assert sum(len(set(of_shard)) for of_shard in rows.values()) == min(count, sum(examples))
    assert all(0 <= row < examples[number] for number in rows for row in rows[number])
