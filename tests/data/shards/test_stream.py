from __future__ import annotations

import gc
import itertools
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.shards.format import DamagedShard, Example
from vidfill.data.shards.reading import Shard, ShardedDataset
from vidfill.data.shards.stream import Batch, Node, SkippedExample, Stream
from vidfill.data.shards.writing import read_index
from vidfill.data.storage.follower import ShardUse
from vidfill.data.storage.names import index_name, shard_name
from vidfill.errors import BadInput
from vidfill.modeling.autoencoder import latent_mask

Sizes = tuple[int, ...]
OpenDataset = Callable[..., ShardedDataset]
WriteDataset = Callable[..., list[Example]]

SIZES = (3, 2, 0, 4, 1, 3)  # examples of the shards
LANES = (3, 4)  # lanes and block: a tail of one, and a lane of one whole and one short block


@pytest.fixture(scope="module")
def open_dataset(
    tmp_path_factory: pytest.TempPathFactory, write_dataset: WriteDataset
) -> OpenDataset:
    """A dataset of shards of these sizes; each is written once."""

    @cache
    def open_sizes(sizes: Sizes = SIZES, **options: object) -> ShardedDataset:
        root = tmp_path_factory.mktemp("dataset")
        write_dataset(root, sizes, **{"lanes": LANES, **options})
        return ShardedDataset(root, "train")

    return open_sizes


@pytest.fixture
def dataset(open_dataset: OpenDataset) -> ShardedDataset:
    return open_dataset()


def take(stream: Stream, first: int, count: int, workers: int = 1) -> list[Batch]:
    """Batches of a run, as float32 copies, since a run's own memory is used again."""
    batches = stream.run(first, workers)
    taken = [batch.to(torch.device("cpu")) for batch in itertools.islice(batches, count)]
    batches.close()
    return taken


def content(batch: Batch) -> list[object]:
    """All that a batch says, its values as bytes."""
    tensors = [batch.weights, batch.latents, batch.masked_latents, batch.latent_mask]
    if batch.log_variance is not None:
        tensors.append(batch.log_variance)
    return [batch.keys, batch.positions, *(tensor.float().numpy().tobytes() for tensor in tensors)]


def held(batch: Batch) -> dict[int, str]:
    """The keys of a batch's examples by their positions, without the pads."""
    pairs = zip(batch.positions, batch.keys, strict=True)
    return {position: key for position, key in pairs if position >= 0}


def shares(dataset: ShardedDataset, batch_size: int, processes: int) -> list[Stream]:
    return [Stream(dataset, batch_size, 0, process, processes) for process in range(processes)]


# Exactly once, alike for all


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.sampled_from([(1,), (2, 3), SIZES, (0, 5)]),
    batch_size=st.integers(1, 15),
    seed=st.integers(0, 99),
)
def test_every_example_comes_exactly_once_an_epoch(
    open_dataset: OpenDataset, sizes: Sizes, batch_size: int, seed: int
) -> None:
    dataset = open_dataset(sizes)
    stream, size = Stream(dataset, batch_size, seed), len(dataset)
    keys: dict[int, str] = {}
    for k in range(-(-3 * size // batch_size)):
        keys |= held(stream.batch(k))
    for epoch in range(3):
        read = [keys[position] for position in range(epoch * size, (epoch + 1) * size)]
        assert sorted(read) == sorted(dataset.keys)


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("batch_size", [1, 6, 12])
def test_a_global_batch_does_not_depend_on_the_processes(
    dataset: ShardedDataset, processes: int, batch_size: int
) -> None:
    whole = Stream(dataset, batch_size, 0)
    parts = shares(dataset, batch_size, processes)
    for k in range(2 * len(dataset) // batch_size + 2):
        batches = [part.batch(k) for part in parts]
        assert len({len(batch.keys) for batch in batches}) == 1
        weights = torch.cat([batch.weights for batch in batches])
        positions = [position for batch in batches for position in batch.positions]
        assert weights.tolist() == [float(position >= 0) for position in positions]
        expected = whole.batch(k)
        assert [position for position in positions if position >= 0] == expected.positions
        assert [key for b in batches for key in held(b).values()] == expected.keys
        latents = torch.cat([batch.latents for batch in batches])
        assert torch.equal(latents[weights > 0], expected.latents)
        assert not latents[weights == 0].any()


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_gives_the_same_bytes(dataset: ShardedDataset, workers: int) -> None:
    run = take(Stream(dataset, 5, 0, 1, 2), 3, 20, workers)
    alone = Stream(dataset, 5, 0, 1, 2)
    assert [content(batch) for batch in run] == [content(alone.batch(k)) for k in range(3, 23)]


@settings(max_examples=10, deadline=None)
@given(
    stop=st.integers(0, 12),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    batch_size=st.integers(1, 9),
)
def test_a_run_resumed_on_other_processes_equals_an_uninterrupted_one(
    open_dataset: OpenDataset, stop: int, before: int, after: int, batch_size: int
) -> None:
    dataset = open_dataset()
    undisturbed = [held(batch) for batch in take(Stream(dataset, batch_size, 0), 0, 14)]
    parts = {(0, stop): before, (stop, 14): after}
    resumed: list[dict[int, str]] = []
    for (first, last), processes in parts.items():
        runs = [take(part, first, last - first) for part in shares(dataset, batch_size, processes)]
        for batches in zip(*runs, strict=True):
            together = [item for batch in batches for item in held(batch).items()]
            assert len(together) == batch_size
            resumed.append(dict(together))
    assert resumed == undisturbed


def test_a_batch_is_a_pure_function_of_its_number(dataset: ShardedDataset) -> None:
    forwards, backwards = (Stream(dataset, 3, 0) for _ in range(2))
    there = [content(forwards.batch(k)) for k in range(20)]
    back = [content(backwards.batch(k)) for k in reversed(range(20))]
    assert there == back[::-1]


def test_epochs_and_seeds_are_ordered_differently(open_dataset: OpenDataset) -> None:
    dataset = open_dataset((5, 5, 5, 5))
    first, second = (Stream(dataset, 20, seed) for seed in (0, 1))
    orders = [first.batch(0), first.batch(1), second.batch(0)]
    assert len({tuple(held(batch)[p] for p in sorted(held(batch))) for batch in orders}) == 3


# What a batch holds


@pytest.mark.parametrize("moments", [False, True])
def test_a_batch_holds_what_its_keys_say(open_dataset: OpenDataset, moments: bool) -> None:
    dataset = open_dataset(moments=moments)
    batch = Stream(dataset, 4, 0).batch(3)
    assert batch.latents.dtype == batch.latent_mask.dtype == torch.float16
    for slot, key in enumerate(batch.keys):
        example = dataset[dataset.keys.index(key)]
        assert torch.equal(batch.latents[slot], torch.from_numpy(example.latents))
        assert torch.equal(batch.masked_latents[slot], torch.from_numpy(example.masked_latents))
        assert torch.equal(batch.latent_mask[slot], latent_mask(example.mask, 2, 2).half())
        if batch.log_variance is None:
            assert not moments
        else:
            assert example.log_variance is not None
            assert torch.equal(batch.log_variance[slot], torch.from_numpy(example.log_variance))


def test_a_moved_batch_is_float32_and_its_own(dataset: ShardedDataset) -> None:
    batches = Stream(dataset, 4, 0).run(0)
    first = next(batches)
    moved = first.to(torch.device("cpu"))
    before = content(first)
    assert content(moved) == before
    assert moved.latents.dtype == moved.masked_latents.dtype == moved.weights.dtype == torch.float32
    assert moved.latents.is_contiguous()
    again = moved.to(torch.device("cpu"))
    for _ in range(10):
        next(batches)
    assert content(moved) == content(again) == before
    batches.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_batch_arrives_on_a_gpu_whole_though_its_memory_is_used_again(
    open_dataset: OpenDataset,
) -> None:
    dataset, device = open_dataset(), torch.device("cuda")
    busy = torch.randn(4096, 4096, device=device)
    batches, moved = Stream(dataset, 8, 0).run(0, workers=2), []
    for batch in itertools.islice(batches, 50):
        for _ in range(5):
            busy = torch.nn.functional.normalize(busy @ busy)  # the copies queue up behind it
        moved.append(batch.to(device))
    batches.close()
    alone = Stream(dataset, 8, 0)
    for k, batch in enumerate(moved):
        assert content(batch.to(torch.device("cpu"))) == content(alone.batch(k))


@pytest.mark.parametrize(("batch_size", "processes"), [(7, 2), (5, 3), (2, 4), (6, 3)])
def test_weights_make_the_processes_mean_the_mean_of_the_batch(
    dataset: ShardedDataset, batch_size: int, processes: int
) -> None:
    def losses(batch: Batch) -> torch.Tensor:
        return batch.latents.double().square().mean(dim=(1, 2, 3, 4)) + 1

    for k in range(5):
        means = []
        for part in shares(dataset, batch_size, processes):
            batch = part.batch(k)
            means.append((batch.weights * losses(batch)).sum() * processes / batch_size)
        averaged = torch.stack(means).mean()  # as data-parallel training averages gradients
        plain = losses(Stream(dataset, batch_size, 0).batch(k)).mean()
        torch.testing.assert_close(averaged, plain)


def test_a_batch_of_nothing_is_refused(dataset: ShardedDataset) -> None:
    with pytest.raises(BadInput, match="batch_size is 0: give 1 or more"):
        Stream(dataset, 0, 0)


# Threads and memory


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


@pytest.mark.parametrize("end", ["close", "collect"])
def test_a_run_that_ends_leaves_no_threads(dataset: ShardedDataset, end: str) -> None:
    batches = Stream(dataset, 3, 0).run(0, workers=3)
    next(batches)
    assert reading_threads()
    if end == "close":
        batches.close()
    else:
        del batches
        gc.collect()
    assert not reading_threads()


@pytest.mark.slow
def test_memory_is_flat_over_many_epochs(dataset: ShardedDataset) -> None:
    batches = Stream(dataset, 4, 0).run(0, workers=2)

    def read(count: int) -> int:
        for batch in itertools.islice(batches, count):
            assert len(batch.keys) == 4
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before, after = read(200), read(2000)
    finally:
        tracemalloc.stop()
        batches.close()
    # Bytes; what was read are 8,000,000, and a list of the batches alone would be 100,000.
    assert after - before < 60_000


def test_a_stream_far_ahead_reads_only_what_it_hands_out(
    dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = Shard.read_span

    def count(shard: Shard, row: int, into: memoryview) -> None:
        read.append(row)
        original(shard, row, into)

    monkeypatch.setattr(Shard, "read_span", count)
    batch = Stream(dataset, 3, 0).batch(10**9)
    assert len(read) == 3
    assert sorted(batch.positions) == [3 * 10**9 + slot for slot in range(3)]


def test_waiting_is_counted(dataset: ShardedDataset) -> None:
    stream = Stream(dataset, 3, 0)
    assert stream.waited == 0
    take(stream, 0, 5)
    assert 0 < stream.waited < 60


# Damage


@pytest.fixture
def damaged(tmp_path: Path, write_dataset: WriteDataset) -> tuple[ShardedDataset, str]:
    """A dataset with one flipped bit, and the key of the example that has it."""
    write_dataset(tmp_path, SIZES, lanes=LANES)
    index = read_index(tmp_path / "train", 3)
    assert index is not None
    path, row = tmp_path / "train" / shard_name(3), 2
    column = index.members["masked_latents.npy"]
    raw = bytearray(path.read_bytes())
    raw[column.offsets[row] + column.sizes[row] - 1] ^= 1
    path.write_bytes(raw)
    return ShardedDataset(tmp_path, "train"), index.keys[row]


def test_a_damaged_example_stops_the_run_at_its_batch(
    damaged: tuple[ShardedDataset, str],
) -> None:
    dataset, key = damaged
    stream, handed_out = Stream(dataset, 2, 0), []
    with pytest.raises(DamagedShard, match=key):
        for batch in stream.run(0, workers=2):
            handed_out.append(batch.keys)
    assert not reading_threads()
    with pytest.raises(DamagedShard, match=key):
        stream.batch(len(handed_out))
    assert handed_out == [Stream(dataset, 2, 0).batch(k).keys for k in range(len(handed_out))]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_skipped_example_leaves_the_others_in_their_places(
    damaged: tuple[ShardedDataset, str], open_dataset: OpenDataset, workers: int
) -> None:
    dataset, key = damaged
    stream = Stream(dataset, 4, 0, damaged="skip")
    undamaged = Stream(open_dataset(), 4, 0)
    lost: list[int] = []
    for k, batch in enumerate(take(stream, 0, 13, workers)):  # four epochs
        whole = undamaged.batch(k)
        kept = [other != key for other in whole.keys]
        assert (batch.keys, batch.positions) == (whole.keys, whole.positions)
        assert batch.weights.tolist() == [float(keep) for keep in kept]
        assert torch.equal(batch.latents[kept], whole.latents[kept].float())
        for slot in range(4):
            if not kept[slot]:
                lost.append(batch.positions[slot])
                assert not batch.latents[slot].any() and not batch.masked_latents[slot].any()
    assert len(lost) == 4
    assert [(s.position, s.key, s.shard) for s in stream.skipped] == [(p, key, 3) for p in lost]
    assert all("checksum" in skip.reason for skip in stream.skipped)


@pytest.mark.parametrize("harm", ["missing", "truncated", "without index"])
def test_a_lost_shard_is_skipped_whole_and_listed(
    tmp_path: Path, write_dataset: WriteDataset, open_dataset: OpenDataset, harm: str
) -> None:
    write_dataset(tmp_path, SIZES, lanes=LANES)
    path = tmp_path / "train" / shard_name(3)
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        (tmp_path / "train" / index_name(3)).unlink()
    dataset = ShardedDataset(tmp_path, "train")
    stream, undamaged = Stream(dataset, 5, 0, damaged="skip"), Stream(open_dataset(), 5, 0)
    kept: list[str] = []
    for k, batch in enumerate(take(stream, 0, 13, workers=2)):  # five epochs
        whole = undamaged.batch(k)
        assert batch.positions == whole.positions
        assert all(key in ("", other) for key, other in zip(batch.keys, whole.keys, strict=True))
        assert batch.weights.tolist() == [float(key != "") for key in batch.keys]
        kept += [key for key in batch.keys if key]
    assert len(kept) == 5 * (len(dataset) - SIZES[3])
    assert len(stream.skipped) == 5 * SIZES[3]
    assert {(skip.shard, skip.key) for skip in stream.skipped} == {(3, "")}
    with pytest.raises(DamagedShard):
        take(Stream(dataset, 5, 0), 0, 3)


def test_skipping_does_not_depend_on_the_processes(damaged: tuple[ShardedDataset, str]) -> None:
    dataset, _ = damaged
    alone = Stream(dataset, 5, 0, damaged="skip")
    take(alone, 0, 13)
    found: list[SkippedExample] = []
    for process in range(3):
        part = Stream(dataset, 5, 0, process, 3, damaged="skip")
        take(part, 0, 13)
        found += part.skipped
    assert sorted(found) == sorted(alone.skipped)


# Nodes


def test_a_node_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Node.from_environment(5, 8) == Node(5, 1, 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert Node.from_environment(5, 8) == Node(4, 4, 1)
    # A process of a launcher that reads a stream of its own is alone with it.
    assert Node.from_environment(0, 1) == Node(0, 1, 0)


@pytest.mark.parametrize("local_process", [0, 1])
def test_the_first_process_of_a_node_brings_what_all_of_it_read(
    dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch, local_process: int
) -> None:
    followed: list[ShardUse] = []

    def follow(uses: Iterator[ShardUse]) -> None:
        ahead = itertools.takewhile(lambda use: use.first < 40 * 4, uses)
        followed.extend(ahead)

    monkeypatch.setattr(dataset.store, "follow", follow)
    node = Node(2, 2, local_process)
    stream = Stream(dataset, 4, 0, 2 + local_process, 4, node=node)
    take(stream, 3, 10)
    if local_process:
        assert not followed
        return
    assert followed[0].first >= 3 * 4
    for k, process in itertools.product(range(3, 40), (2, 3)):
        positions = stream.order.share(k, 4, process, 4)
        numbers, _ = stream.order.locate(positions)
        for position, number in zip(positions.tolist(), numbers.tolist(), strict=True):
            assert any(v.shard == number and v.first <= position <= v.last for v in followed)


def test_a_node_without_a_slot_fetches_nothing(
    dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[Iterator[ShardUse]] = []
    monkeypatch.setattr(dataset.store, "follow", followed.append)
    [batch] = take(Stream(dataset, 2, 0, 5, 8, node=Node(5, 1, 0)), 0, 1)
    assert batch.positions == [-1] and batch.weights.tolist() == [0]
    assert not followed


def test_what_any_process_in_lockstep_still_holds_or_awaits_is_not_passed(
    dataset: ShardedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    monkeypatch.setattr(dataset.store, "passed", passed.append)
    stream = Stream(dataset, 5, 0, 1, 2)
    for k, _ in zip(range(7, 20), stream.run(7, workers=2), strict=False):
        assert passed == [5 * max(7, passing - 5) for passing in range(7, k + 1)]
