"""Test the batching plan: the same rows per step for every split, no row lost or repeated, all limits kept."""

import numpy as np
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.batching import BatchPlan, shuffled
from rlhf_lightning.micro_batches import cells_of
from rlhf_lightning.types import MicroBatchLimits


def plan(lengths, tokens=None, **changes):
    given = {"batch_size": 4, **changes}
    limits = MicroBatchLimits(given.pop("micro_batch_size", None), given.pop("max_tokens", None))
    return BatchPlan(lengths, [1] * len(lengths) if tokens is None else tokens, limits=limits, **given)


def shares(plan, step):
    return [plan.step(step, rank) for rank in range(plan.ranks)]


def test_rows_of_a_step_are_sorted_by_length_into_micro_batches():
    found = plan([3, 9, 1, 5], [1, 2, 3, 4], micro_batch_size=2, shuffle=False).step(0, 0)
    assert found == (((1, 3), (0, 2)), 4, 10)


def test_the_token_budget_includes_padding():
    # 9 alone fills 10 cells, 5 and 3 together 2 x 5, and 1 is left: three micro-batches. Three micro-batches of at most
    # 9 cells are 9, 5 and 3 + 1, the most expensive first.
    found = plan([3, 9, 1, 5], max_tokens=10, shuffle=False).step(0, 0)
    assert found.micro_batches == ((1,), (0, 2), (3,))


def test_rows_of_a_step_are_split_evenly_over_ranks():
    # 8 + 1 short rows against 2 long rows: ranks get equally many micro-batches and about equally many positions.
    lengths = [8, 8, 2, 2, 2, 2, 2, 2, 2, 2]
    found = plan(lengths, batch_size=10, ranks=2, shuffle=False)
    assert [share.micro_batches for share in shares(found, 0)] == [((0, 1),), ((2, 3, 4, 5, 6, 7, 8, 9),)]


def test_the_last_step_is_short_or_dropped():
    assert [plan([1] * 10, drop_last=drop).steps for drop in (False, True)] == [3, 2]
    assert plan([1] * 10).step(2, 0).rows == 2


def test_ranks_without_a_row_get_an_empty_micro_batch():
    found = shares(plan([1] * 5, ranks=4), 1)
    assert [share.micro_batches for share in found] == [((found[0].micro_batches[0][0],),), ((),), ((),), ((),)]
    assert {(share.rows, share.tokens) for share in found} == {(1, 1)}


def test_each_epoch_is_shuffled_differently():
    orders = {(seed, epoch): tuple(shuffled(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert all(sorted(order) == list(range(50)) for order in orders.values())


def test_the_order_is_the_same_on_every_machine():
    assert shuffled(8, 1, 0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_shuffling_is_uniform():
    places = np.array([shuffled(4, seed, 0) for seed in range(1000)])
    counts = np.array([[np.sum(places[:, place] == row) for row in range(4)] for place in range(4)])
    assert np.abs(counts - 250).max() < 5 * np.sqrt(1000 * 0.25 * 0.75)


CASES = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=40),
        "batch_size": st.integers(1, 24),
        "micro_batch_size": st.none() | st.integers(1, 9),
        "max_tokens": st.none() | st.integers(1, 200),
        "ranks": st.integers(1, 5),
        "seed": st.integers(0, 2**40),
        "epoch": st.integers(0, 9),
        "shuffle": st.booleans(),
        "packed": st.booleans(),
    }
)


@settings(max_examples=80, deadline=None)
@given(CASES)
def test_steps_have_the_same_rows_for_any_ranks_and_micro_batch_size(case):
    lengths = case.pop("lengths")
    tokens = [length // 2 for length in lengths]
    cut = plan(lengths, tokens, **case)
    whole = plan(lengths, tokens, **{**case, "ranks": 1, "micro_batch_size": None, "max_tokens": None})
    assert len(cut) == len(whole) == -(-len(lengths) // case["batch_size"])
    seen = []
    for step in range(len(cut)):
        found = shares(cut, step)
        rows = [row for share in found for group in share.micro_batches for row in group]
        assert sorted(rows) == sorted(whole.step(step, 0).micro_batches[0]), "a step's rows depend on its cut"
        assert len(rows) == len(set(rows)) <= case["batch_size"]
        assert len({len(share.micro_batches) for share in found}) == 1, "ranks differ in their number of micro-batches"
        for share in found:
            assert (share.rows, share.tokens) == (len(rows), sum(tokens[row] for row in rows))
            for group in share.micro_batches:
                if case["micro_batch_size"]:
                    assert len(group) <= case["micro_batch_size"]
                if case["max_tokens"] and len(group) > 1:
                    assert cells_of([lengths[row] for row in group], case["packed"]) <= case["max_tokens"]
        groups = sum(len(share.micro_batches) for share in found)
        if len(rows) >= groups:
            assert all(group for share in found for group in share.micro_batches), "a rank idles without need"
        seen += rows
    assert sorted(seen) == list(range(len(lengths)))
    again = plan(lengths, tokens, **case)
    assert [shares(again, step) for step in range(len(again))] == [shares(cut, step) for step in range(len(cut))]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 200), min_size=16, max_size=64), st.integers(2, 4), st.integers(300, 1000), st.booleans()
)
def test_work_is_balanced_over_ranks(lengths, ranks, max_tokens, packed):
    found = plan(lengths, batch_size=len(lengths), ranks=ranks, max_tokens=max_tokens, packed=packed)
    costs = [
        sum(cells_of([lengths[row] for row in group], packed) for group in share.micro_batches if group)
        for share in shares(found, 0)
    ]
    assert max(costs) - min(costs) <= max_tokens


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"batch_size": 0}, "setting-out-of-range", "batch_size is 0: it must be at least 1"),
        ({"ranks": 0}, "setting-out-of-range", "ranks is 0: it must be at least 1"),
        ({"max_tokens": 0}, "setting-out-of-range", "max_tokens is 0: it must be at least 1, or None"),
        ({"micro_batch_size": -1}, "setting-out-of-range", "micro_batch_size is -1: it must be at least 1, or None"),
        ({"tokens": [1]}, "shape-mismatch", "3 lengths for 1 token counts"),
        ({"lengths": []}, "no-rows", "at least one row"),
        ({"drop_last": True}, "batch-too-large", "3 rows are fewer than batch_size 4"),
    ],
)
def test_invalid_sizes_are_refused(changes, code, message):
    with refused(code, message):
        plan(**{"lengths": [1, 2, 3], **({"tokens": []} if changes.get("lengths") == [] else {}), **changes})


def test_a_step_outside_the_epoch_is_refused():
    with refused("no-such-step", "step 1 is outside an epoch of 1"):
        plan([1, 2]).step(1, 0)


def test_a_row_over_the_token_budget_gets_its_own_micro_batch():
    (share,) = shares(plan([1, 1, 2, 4], shuffle=False, max_tokens=2), 0)
    assert sorted(map(sorted, share.micro_batches)) == [[0, 1], [2], [3]]
