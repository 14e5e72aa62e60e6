"""The reference's log-probabilities of fixed data are computed once, while its weights and the rows stay the same."""

import sqlite3
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_same, fit, gradients_of_step, preference_step, random_pairs, save_policy, sequences

from rlhf_lightning.loading import cache_folder
from rlhf_lightning.models.frozen import ReferenceCache, row_keys
from rlhf_lightning.models.layout import padded_layout
from rlhf_lightning.models.resolving import content_hash
from rlhf_lightning.modules import DPOModule, TRDPOModule

PAIRS = random_pairs(7, seed=3)
ROWS = sequences([([5, 6], [7, 8, 2]), ([5, 6], [9]), ([5], [6, 7, 8])])


def calls_of(module: Any) -> list[Any]:
    """Record every forward pass of the reference."""
    calls: list[Any] = []
    original = module.reference.logprobs

    def counted(layout: Any, *args: Any) -> Any:
        calls.append(layout)
        return original(layout, *args)

    module.reference.logprobs = counted
    return calls


def test_cached_rows_are_read_back_exactly(tmp_path: Path) -> None:
    layout = padded_layout(ROWS)
    for dtype in (torch.float32, torch.float64):
        grid = torch.randn(layout.completion_mask.shape, dtype=dtype) * layout.completion_mask
        cache = ReferenceCache(tmp_path / "deep" / "rows.sqlite")
        assert cache.read(ROWS, layout.completion_mask, dtype) is None
        cache.write(ROWS, grid)
        found = ReferenceCache(cache.file).read(ROWS, layout.completion_mask, dtype)
        assert found is not None and torch.equal(found, grid)


def test_cache_keys_cover_everything_that_logprobs_depend_on() -> None:
    changed = [
        sequences([([5, 6], [7, 8, 2])]),
        sequences([([5], [6, 7, 8, 2])]),  # the same ids with another prompt length
        sequences([([5, 6], [7, 8, 3])]),
        sequences([([5, 6], [7, 8, 2])], supervised=[[True, False, True]]),
    ]
    keys = {row_keys(rows, torch.float32)[0] for rows in changed}
    assert len(keys | {row_keys(changed[0], torch.float64)[0]}) == 5


def test_later_epochs_and_runs_skip_the_reference_forward(policy_folder: str) -> None:
    step, counts, weights = preference_step(PAIRS, 3), [], []
    for cached in (False, True, True):
        module = DPOModule(init_from=policy_folder, beta=0.5, cache_reference=cached, learning_rate=1e-2)
        module.configure_model()
        calls = calls_of(module)
        fit(module, [step], max_epochs=3)
        counts.append(len(calls))
        weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
    assert counts == [9, 3, 0]
    assert all(torch.equal(weights[0][name], weights[run][name]) for name in weights[0] for run in (1, 2))


def test_the_cache_is_not_used_for_other_weights_or_moving_references(tmp_path: Path) -> None:
    folders = [save_policy(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 1))]
    assert content_hash(folders[0]) != content_hash(folders[1])
    assert content_hash("no/such-model-here") is None
    for folder in folders:
        module = DPOModule(init_from=folder, beta=0.5)
        module.configure_model()
        calls = calls_of(module)
        gradients_of_step(module, preference_step(PAIRS))
        assert len(calls) == 1
    assert len(list((cache_folder() / "reference").glob("*.sqlite"))) == 2
    module = TRDPOModule(init_from=folders[0], beta=0.5)
    module.configure_model()
    calls = calls_of(module)
    gradients_of_step(module, preference_step(PAIRS))
    assert len(calls) == 1


def test_gradients_from_the_cache_are_the_same_for_any_micro_batches(policy_folder: str) -> None:
    found = []
    for micro in (None, 2, 3):
        module = DPOModule(init_from=policy_folder, beta=0.5, max_grad_norm=None)
        module.configure_model()
        module.double()
        for frozen in module.frozen_models():
            frozen.double()
        found.append(gradients_of_step(module, preference_step(PAIRS, micro)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_a_damaged_cache_file_only_warns(tmp_path: Path) -> None:
    file = tmp_path / "rows.sqlite"
    file.write_bytes(b"not a database, but long enough to be taken for one" * 40)
    layout, cache = padded_layout(ROWS), ReferenceCache(file)
    with pytest.warns(UserWarning, match=r"are not kept: .*rows\.sqlite cannot be used"):
        assert cache.read(ROWS, layout.completion_mask, torch.float32) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        cache.write(ROWS, torch.zeros(layout.completion_mask.shape))


def test_concurrent_writers_keep_the_first_value(tmp_path: Path) -> None:
    layout = padded_layout(ROWS)
    first, second = (ReferenceCache(tmp_path / "rows.sqlite") for _ in range(2))
    grid = torch.ones(layout.completion_mask.shape) * layout.completion_mask
    first.write(ROWS, grid)
    second.write(ROWS, 2 * grid)  # the first value is kept, so that all ranks use the same values
    for cache in (first, second):
        found = cache.read(ROWS, layout.completion_mask, torch.float32)
        assert found is not None and torch.equal(found, grid)
    with sqlite3.connect(first.file) as connection:
        assert connection.execute("SELECT count(*) FROM logprobs").fetchone() == (3,)
