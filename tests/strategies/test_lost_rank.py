"""When a rank is killed, the others end soon and name the lost rank."""

import time
from collections.abc import Iterator

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="module")
def own_pool() -> Iterator[RankPool]:
    """Return a separate pool, because a group with a killed rank cannot be reused."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "strategy", "rank"), [("DPOModule", "ddp", 1), ("DPOModule", "ddp", 0), ("PPOModule", "fsdp", 1)]
)
def test_other_ranks_exit_and_name_the_lost_rank(
    own_pool: RankPool, policy_folder: str, name: str, strategy: str, rank: int
) -> None:
    own_pool.run(2, "here")  # started before, so that only the run is timed
    began = time.monotonic()
    (said,) = own_pool.lose(2, "lose", rank=rank, name=name, folder=policy_folder, strategy=strategy)
    print(f"{name}, {strategy}: ended {time.monotonic() - began:.1f} s after the start")
    assert said.startswith(f"another rank does not respond: rank {rank} (process ")
    assert "on this host) has ended" in said and "--resume" in said and "\n" not in said
