from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.masks import latent_mask
from vidfill.data.shards import Example, ShardedDataset
from vidfill.data.stream import Stream
from vidfill.jobs import BadInput

OpenDataset = Callable[[int], ShardedDataset]


@pytest.fixture(scope="module")
def open_dataset(
    tmp_path_factory: pytest.TempPathFactory, write_dataset: Callable[..., list[Example]]
) -> OpenDataset:
    """A dataset of so many examples; each size is written once."""

    @cache
    def open_size(count: int) -> ShardedDataset:
        root = tmp_path_factory.mktemp("dataset")
        write_dataset(root, count)
        return ShardedDataset(root, "train")

    return open_size


def read_keys(stream: Stream, batches: int) -> list[str]:
    return [key for k in range(batches) for key in stream.batch(k).keys]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 9), batch_size=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_example_comes_exactly_once_an_epoch(
    open_dataset: OpenDataset, size: int, batch_size: int, seed: int
) -> None:
    dataset = open_dataset(size)
    keys = read_keys(Stream(dataset, batch_size, seed), -(-3 * size // batch_size))
    for epoch in range(3):
        assert sorted(keys[epoch * size : (epoch + 1) * size]) == sorted(dataset.keys)


@pytest.mark.parametrize("process_count", [1, 2, 3, 4, 6, 12])
def test_a_global_batch_does_not_depend_on_the_processes(
    open_dataset: OpenDataset, process_count: int
) -> None:
    dataset = open_dataset(7)
    shares = [Stream(dataset, 12, 0, index, process_count) for index in range(process_count)]
    for k in range(4):
        whole = Stream(dataset, 12, 0).batch(k)
        parts = [share.batch(k) for share in shares]
        assert [key for part in parts for key in part.keys] == whole.keys
        assert [p for part in parts for p in part.positions] == whole.positions
        assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)


def test_a_batch_is_a_pure_function_of_its_number(open_dataset: OpenDataset) -> None:
    forwards, backwards = (Stream(open_dataset(7), 3, 0) for _ in range(2))
    there = [forwards.batch(k).keys for k in range(20)]
    back = [backwards.batch(k).keys for k in reversed(range(20))]
    assert there == back[::-1]


def test_a_resumed_stream_reads_nothing_it_does_not_hand_out(
    open_dataset: OpenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = ShardedDataset.__getitem__

    def count(dataset: ShardedDataset, index: int) -> Example:
        read.append(index)
        return original(dataset, index)

    monkeypatch.setattr(ShardedDataset, "__getitem__", count)
    batch = Stream(open_dataset(7), 3, 0).batch(10**9)
    assert len(read) == 3
    assert batch.positions == [3 * 10**9 + slot for slot in range(3)]


def test_epochs_and_seeds_are_ordered_differently(open_dataset: OpenDataset) -> None:
    first, second = (Stream(open_dataset(40), 40, seed) for seed in (0, 1))
    orders = [first.batch(0).keys, first.batch(1).keys, second.batch(0).keys]
    assert len({tuple(order) for order in orders}) == 3


def test_a_batch_holds_what_its_keys_say(open_dataset: OpenDataset) -> None:
    dataset = open_dataset(7)
    batch = Stream(dataset, 4, 0).batch(3)
    assert batch.latents.dtype == batch.masked_latents.dtype == torch.float32
    for slot, key in enumerate(batch.keys):
        example = dataset[dataset.keys.index(key)]
        assert torch.equal(batch.latents[slot].half(), torch.from_numpy(example.latents))
        assert torch.equal(
            batch.masked_latents[slot].half(), torch.from_numpy(example.masked_latents)
        )
        assert torch.equal(batch.latent_mask[slot], latent_mask(example.mask, 2, 2))


def test_a_batch_that_cannot_be_shared_is_refused(open_dataset: OpenDataset) -> None:
    with pytest.raises(BadInput, match="batch_size is 5, shared by 2 processes"):
        Stream(open_dataset(7), 5, 0, 0, 2)
