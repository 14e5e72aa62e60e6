from collections.abc import Iterator

import pytest
from rank_pool import RankPool
from tiny_folders import one_thread, other_folder, policy_folder, reward_folder

__all__ = ["one_thread", "other_folder", "policy_folder", "reward_folder"]


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()
