from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vidfill.data.shards.order import Order, choose_lanes, hash_numbers
from vidfill.data.storage.follower import ShardUse
from vidfill.seeding import derive_seed

sizes = st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any)
# Of an Order; the tests make it, since checked annotations draw numbers, which no strategy may.
orders = st.tuples(sizes, st.integers(1, 9), st.integers(1, 12), st.integers(0, 9))
Fields = tuple[list[int], int, int, int]


def read(order: Order, first: int, count: int) -> list[tuple[int, int]]:
    shards, rows = order.locate(np.arange(first, first + count))
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def split_mix(key: int, number: int) -> int:
    """SplitMix64 in Python's integers, as its authors' Java has it."""
    wrap = 2**64 - 1
    z = (key + (number + 1) * 0x9E3779B97F4A7C15) & wrap
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
    return z ^ (z >> 31)


def read_in_plain_python(
    examples: Sequence[int], lanes: int, block: int, seed: int, epoch: int
) -> list[tuple[int, int]]:
    """An epoch as the design says it, word by word."""
    shard_key = derive_seed(seed, epoch, "shards")
    shards = sorted(range(len(examples)), key=lambda shard: split_mix(shard_key, shard))
    row = [(shard, place) for shard in shards for place in range(examples[shard])]
    length = len(row) // lanes
    cut = [row[lane * length : (lane + 1) * length] for lane in range(lanes)]
    permuted = []
    for lane, content in enumerate([*cut, row[lanes * length :]]):
        mixed = []
        for number, first in enumerate(range(0, len(content), block)):
            part = content[first : first + block]
            key = derive_seed(seed, epoch, lane, number, "block")
            turns = sorted(range(len(part)), key=lambda turn, key=key: split_mix(key, turn))
            mixed += [part[turn] for turn in turns]
        permuted.append(mixed)
    turns = [permuted[lane][offset] for offset in range(length) for lane in range(lanes)]
    return turns + permuted[lanes]


def test_the_hash_gives_the_published_numbers() -> None:
    # The first outputs of SplitMix64 from the state 1234567, as other implementations test them.
    assert hash_numbers(1234567, np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(key=st.integers(0, 2**63 - 1), numbers=st.lists(st.integers(0, 2**62)))
def test_the_hash_is_that_of_unbounded_integers(key: int, numbers: list[int]) -> None:
    hashes = hash_numbers(key, np.array(numbers, dtype=np.int64))
    assert hashes.tolist() == [split_mix(key, number) for number in numbers]


def test_the_order_never_changes() -> None:
    # Written down once: a machine or a version that reads otherwise breaks every resumed run.
    order = Order((3, 0, 2, 4, 1, 1), lanes=2, block=3, seed=7)
    first = "3.0 5.0 2.0 0.0 2.1 3.3 3.1 0.1 3.2 0.2 4.0"
    late = "3.0 2.0 5.0 3.3 4.0 2.1 3.1 0.1 3.2 0.0 0.2"
    for epoch, expected in {0: first, 10**9: late}.items():
        found = read(order, epoch * 11, 11)
        assert " ".join(f"{shard}.{row}" for shard, row in found) == expected


@settings(max_examples=20, deadline=None)
@given(sizes, st.integers(1, 9), st.integers(1, 12), st.integers(0, 9), st.integers(0, 5))
def test_the_order_is_what_the_design_says(
    examples: list[int], lanes: int, block: int, seed: int, epoch: int
) -> None:
    order, count = Order(examples, lanes, block, seed), sum(examples)
    assert read(order, epoch * count, count) == read_in_plain_python(
        examples, lanes, block, seed, epoch
    )


@settings(max_examples=20, deadline=None)
@given(examples=sizes, lanes=st.integers(1, 99), block=st.integers(1, 99), seed=st.integers(0, 9))
def test_every_example_comes_exactly_once_an_epoch(
    examples: list[int], lanes: int, block: int, seed: int
) -> None:
    order, count = Order(examples, lanes, block, seed), sum(examples)
    everything = [(shard, row) for shard, rows in enumerate(examples) for row in range(rows)]
    for epoch in (0, 1, 2, 10**6):
        assert sorted(read(order, epoch * count, count)) == everything


@settings(max_examples=20, deadline=None)
@given(fields=orders, positions=st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_a_position_is_read_alike_alone_and_among_others(
    fields: Fields, positions: list[int]
) -> None:
    order = Order(*fields)
    shards, rows = order.locate(np.array(positions))
    together = list(zip(shards.tolist(), rows.tolist(), strict=True))
    assert together == [read(order, position, 1)[0] for position in positions]


@settings(max_examples=20, deadline=None)
@given(fields=orders, k=st.integers(0, 50), batch_size=st.integers(1, 40))
@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8, 64])
def test_processes_share_a_batch_evenly_without_loss(
    fields: Fields, k: int, batch_size: int, processes: int
) -> None:
    order = Order(*fields)
    shares = [order.share(k, batch_size, process, processes) for process in range(processes)]
    held = [share[share >= 0] for share in shares]
    assert sorted(np.concatenate(held)) == list(range(k * batch_size, (k + 1) * batch_size))
    assert np.concatenate(held).tolist() == order.share(k, batch_size, 0, 1).tolist()
    lengths = [len(positions) for positions in held]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
    for share, length in zip(shares, lengths, strict=True):
        assert len(share) == lengths[0] and (share[length:] == -1).all()


def test_epochs_and_seeds_are_ordered_differently() -> None:
    examples = [5] * 20
    lanes, block = choose_lanes(examples)
    orders = [
        read(Order(examples, lanes, block, seed), epoch * 100, 100)
        for seed in range(3)
        for epoch in range(3)
    ]
    for one, other in itertools.combinations(orders, 2):
        # Of two random orders about one place in a hundred agrees.
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


@given(examples=st.lists(st.integers(0, 2000), min_size=1, max_size=300).filter(any))
def test_a_lane_has_two_shards_and_a_block_holds_two(examples: list[int]) -> None:
    lanes, block = choose_lanes(examples)
    filled = [count for count in examples if count]
    assert lanes == min(64, max(1, len(filled) // 2))
    if lanes == 1:
        assert block == sum(examples)
    else:
        assert 0 <= block - 2 * sum(filled) / len(filled) < 1


# How well an epoch is shuffled. A buffer shuffles as far as it is long; here that is one block of
# every lane, and beyond it the order of the shards is random as a whole.

SHARDS, ROWS = 640, 40


@pytest.fixture(scope="module")
def epoch() -> tuple[Order, np.ndarray]:
    """An order, and the positions that read each shard's rows in its first epoch."""
    examples = [ROWS] * SHARDS
    order = Order(examples, *choose_lanes(examples), seed=0)
    shards, rows = order.locate(np.arange(SHARDS * ROWS))
    positions = np.empty((SHARDS, ROWS), dtype=np.int64)
    positions[shards, rows] = np.arange(SHARDS * ROWS)
    return order, positions


def test_neighbours_in_a_shard_are_never_in_one_batch_of_a_lane_s_width(
    epoch: tuple[Order, np.ndarray],
) -> None:
    order, positions = epoch
    for one, other in itertools.combinations(range(ROWS), 2):
        distance = np.abs(positions[:, one] - positions[:, other])
        in_one_lane = positions[:, one] % order.lanes == positions[:, other] % order.lanes
        assert (distance[in_one_lane] >= order.lanes).all()
    # A shard at the seam of two lanes is read by both: there are no more of those than lanes.
    batches = positions // order.lanes
    meet = [len(set(row)) < ROWS for row in batches.tolist()]
    assert sum(meet) <= order.lanes


def test_neighbours_in_a_shard_are_as_far_apart_as_chance_puts_them_in_a_block(
    epoch: tuple[Order, np.ndarray],
) -> None:
    order, positions = epoch
    reach = order.lanes * order.block  # positions that a block spreads over
    same_block = positions[:, 1:] // reach == positions[:, :-1] // reach
    distance = np.abs(np.diff(positions))[same_block]
    # Two random places of n differ by n / 3 in the mean, 29 % of them by less than n / 6.4.
    assert distance.mean() == pytest.approx(reach / 3, rel=0.02)
    assert np.mean(distance < reach / 6.4) == pytest.approx(0.288, abs=0.01)
    assert np.corrcoef(positions[:, :-1].ravel() % reach, positions[:, 1:].ravel() % reach)[
        0, 1
    ] == pytest.approx(0, abs=0.02)


def test_shards_are_spread_over_the_epoch_evenly(epoch: tuple[Order, np.ndarray]) -> None:
    _, positions = epoch
    first = positions.min(axis=1) / positions.size
    # Neighbouring shards are as far apart as chance puts them in the whole epoch.
    assert np.abs(np.diff(first)).mean() == pytest.approx(1 / 3, abs=0.03)


def test_a_batch_holds_about_as_many_shards_as_chance_would_give_it(
    epoch: tuple[Order, np.ndarray],
) -> None:
    order, _ = epoch
    found, batch_size = [], 64
    for k in range(200):
        shards, _ = order.locate(order.share(k, batch_size, 0, 1))
        found.append(len(set(shards.tolist())))
    by_chance = SHARDS * (1 - (1 - 1 / SHARDS) ** batch_size)
    assert np.mean(found) >= by_chance


# What is read ahead


def uses_until(order: Order, position: int, end: int, lanes: set[int]) -> list[ShardUse]:
    uses = order.uses(position, lambda first, last: lanes)
    return list(itertools.takewhile(lambda use: use.first < end, uses))


@settings(max_examples=20, deadline=None)
@given(fields=orders, position=st.integers(0, 60))
def test_uses_are_the_first_and_last_read_of_each_block_s_shards(
    fields: Fields, position: int
) -> None:
    order = Order(*fields)
    end = position + 2 * order.examples
    uses = uses_until(order, position, end, set(range(order.lanes + 1)))
    assert [use.first for use in uses] == sorted(use.first for use in uses)
    for use in uses:
        (first, _), (last, _) = read(order, use.first, 1)[0], read(order, use.last, 1)[0]
        assert first == last == use.shard and position <= use.first <= use.last
    for at, (shard, _) in enumerate(read(order, position, 2 * order.examples), start=position):
        assert any(v.shard == shard and v.first <= at <= v.last for v in uses)


@settings(max_examples=20, deadline=None)
@given(
    fields=orders,
    batch_size=st.integers(1, 30),
    first_batch=st.integers(0, 8),
    nodes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_a_node_s_uses_cover_what_its_processes_read(
    fields: Fields, batch_size: int, first_batch: int, nodes: list[int]
) -> None:
    order = Order(*fields)
    processes, first_process = sum(nodes), 0
    batches = range(first_batch, first_batch + 3 * order.examples // batch_size + 2)
    for count in nodes:

        def lanes_of(first: int, last: int, node: tuple[int, int] = (first_process, count)):
            return order.lanes_read(first, last, batch_size, *node, processes)

        shares = [
            order.share(k, batch_size, process, processes)
            for k in batches
            for process in range(first_process, first_process + count)
        ]
        reads = np.concatenate(shares)
        reads = reads[reads >= 0]
        uses = order.uses(first_batch * batch_size, lanes_of)
        end = max(reads.tolist(), default=0)
        # A process without a slot uses nothing, however far one looks.
        known = list(itertools.takewhile(lambda v, end=end: v.first <= end, uses if end else ()))
        for at, shard in zip(reads.tolist(), order.locate(reads)[0].tolist(), strict=True):
            assert any(v.shard == shard and v.first <= at <= v.last for v in known)
        first_process += count


@settings(max_examples=20, deadline=None)
@given(fields=orders, position=st.integers(0, 60))
def test_a_resumed_reader_visits_what_an_undisturbed_one_still_has_to(
    fields: Fields, position: int
) -> None:
    order = Order(*fields)
    lanes, end = set(range(order.lanes + 1)), position + order.examples
    before = [use for use in uses_until(order, 0, end, lanes) if use.last >= position]
    after = uses_until(order, position, end, lanes)
    assert sorted((v.shard, v.last) for v in after) == sorted((v.shard, v.last) for v in before)


def test_a_resumed_reader_reads_again_at_most_one_block_a_lane(
    epoch: tuple[Order, np.ndarray],
) -> None:
    order, _ = epoch
    for position in range(0, order.examples, 2503):
        again = [
            use
            for use in uses_until(order, 0, position, set(range(order.lanes + 1)))
            if use.last >= position
        ]
        assert len(again) <= 3 * order.lanes  # two shards' length lies in three shards at most


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [64, 192, 1024])
def test_a_shard_goes_to_about_one_node_an_epoch(nodes: int, batch_size: int) -> None:
    examples = [5 + number % 7 for number in range(2560)]
    order = Order(examples, *choose_lanes(examples), seed=0)
    fetched = 0
    for node in range(nodes):
        uses = order.uses(
            order.examples,  # the second epoch starts in the middle of a batch
            lambda first, last, node=node: order.lanes_read(
                first, last, batch_size, node, 1, nodes
            ),
        )
        epoch = itertools.takewhile(lambda use: use.first < 2 * order.examples, uses)
        fetched += len({use.shard for use in epoch})
    # More than once is a seam between lanes, or the batch between two epochs.
    assert 1 <= fetched / len(examples) < 1.1


def test_lanes_read_are_those_of_every_batch() -> None:
    examples = [3] * 50
    order = Order(examples, lanes=12, block=4, seed=0)
    for batch_size, processes in itertools.product((5, 8, 12, 30, 36), (1, 2, 3, 7)):
        for epoch, first in itertools.product(range(3), range(0, 144, 48)):
            start = epoch * 150 + first
            expected: dict[int, set[int]] = {process: set() for process in range(processes)}
            for k in range(start // batch_size, (start + 47) // batch_size + 1):
                for process in range(processes):
                    share = order.share(k, batch_size, process, processes)
                    inside = share[(share >= start) & (share < start + 48)]
                    expected[process] |= {int(p) % 150 % 12 for p in inside}
            for process in range(processes):
                lanes = order.lanes_read(start, start + 47, batch_size, process, 1, processes)
                assert lanes == expected[process]
