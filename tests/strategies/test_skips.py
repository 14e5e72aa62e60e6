"""One rank's loss or gradient is NaN: all ranks skip the update, and all stop together."""

from typing import Any

import pytest
import torch
from rank_pool import RankPool


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_skip_and_stop_together(pool: RankPool, policy_folder: str, strategy: str, masked: bool) -> None:
    case = {"folder": policy_folder, "strategy": strategy, "masked": masked}
    answers: list[dict[str, Any]] = pool.run(2, "skip", **case, poison=[1, 3, 4])
    for answer in answers:
        assert (answer["failure"], answer["skipped"], answer["updates"]) == ("", 3, 6)
        assert all(bool(weight.isfinite().all()) for weight in answer["weights"].values())
    first, second = (answer["weights"] for answer in answers)
    assert all(torch.equal(first[name], second[name]) for name in first)
    answers = pool.run(2, "skip", **case, poison=[1, 2, 3])
    for answer in answers:
        assert answer["failure"].startswith("DivergenceError: non-finite loss or gradient in 3 consecutive updates")
        assert (answer["skipped"], answer["updates"]) == (3, 4)
