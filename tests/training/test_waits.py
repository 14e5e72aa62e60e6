"""Test how often an update waits for its device: reading a value, or a shape that depends on values, waits for it."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_cases import judged_steps, low_words
from tiny_models import (
    demonstration_step,
    fit,
    preference_step,
    prompt_step,
    quiet_trainer,
    random_pairs,
    random_rows,
    ranked_step,
    within,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_lightning.models import packing, transfer
from rlhf_lightning.modules import (
    AttributesRewardModule,
    CostModule,
    DPOModule,
    GRPOModule,
    PlackettLuceModule,
    PPOModule,
    ProcessRewardModule,
    RewardModule,
    SFTModule,
    process_reward,
    reward,
)
from rlhf_lightning.training.meter import Meter
from rlhf_lightning.types import Step

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave", "bincount"}
COPIES = ("tolist", "cpu", "numpy")
PROMPTS = [prompt for prompt, _ in random_rows(4, seed=3) for _ in range(2)]


class Waits(TorchDispatchMode):
    """Counts the operations for which a host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on_host = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        chosen = args[1] if name.startswith(("index", "_index_put")) and isinstance(args[1], list | tuple) else ()
        if name in READS or any(one is not None and one.dtype == torch.bool for one in chosen):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        if not self.on_host:
            self.found.append(name)

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function; a call of it is noted."""

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            self.note(function.__name__)
            return function(*args)

        return call

    def planned(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which works on the host with tensors that are always there."""

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            self.on_host, before = True, self.on_host
            try:
                return function(*args)
            finally:
                self.on_host = before

        return call


def waits_of_updates(module: Any, steps: list[Step[Any]], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Train, and return what each update waited for."""
    waits, found = Waits(), list[list[str]]()
    name = "learn_minibatch" if hasattr(module, "learn_minibatch") else "update"
    step = getattr(module, name)

    def watched(*args: Any) -> float:
        waits.found = []
        with monkeypatch.context() as patched, waits:
            for copy in COPIES:
                patched.setattr(Tensor, copy, waits.counted(getattr(Tensor, copy)))
            norm = step(*args)
        found.append(waits.found)
        return float(norm)

    monkeypatch.setattr(module, name, watched)
    for host in ("lay_out", "cut") if hasattr(module, "cut") else ("lay_out",):
        monkeypatch.setattr(module, host, waits.planned(getattr(module, host)))
    for room, host in ((reward, "untied_pairs"), (process_reward, "padded_layout")):  # of batches, on the host
        monkeypatch.setattr(room, host, waits.planned(getattr(room, host)))
    blocks_of = packing.blocks_of
    monkeypatch.setattr(packing, "blocks_of", waits.planned(lambda trees: [*blocks_of(trees)]))
    fit(module, steps)
    return found


def test_an_update_waits_once_for_the_device(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = {"init_from": policy_folder, "lr_schedule": "constant"}
    sampled = {"scorer": low_words, "max_new_tokens": 6, **offline}
    prompts = [prompt_step(PROMPTS[::2], first_episode=4 * number) for number in range(2)]
    (batch,) = prompt_step(PROMPTS).micro_batches
    groups = [Step((batch._replace(group=torch.arange(8) // 2),), 8, 0)]
    demonstrations = [demonstration_step(random_rows(5, seed=seed), 2) for seed in range(2)]
    pairs = [preference_step(random_pairs(4, seed=seed), 2, target=[1.0, 0.5, 0.7, 1.0]) for seed in range(2)]
    assert waits_of_updates(SFTModule(**offline), demonstrations, monkeypatch) == [["tolist"]] * 2
    # On a CPU the loss of pairs also reads whether all labels are certain, once per micro-batch.
    found = waits_of_updates(DPOModule(cache_reference=False, **offline), pairs, monkeypatch)
    assert found == [["_local_scalar_dense"] * 2 + ["tolist"]] * 2
    ppo = PPOModule(ppo_epochs=2, mini_batch_size=2, entropy_coef=0.1, early_stop_kl=9.0, **sampled)
    assert waits_of_updates(ppo, within(prompts, 1), monkeypatch) == [["tolist"]] * 8
    assert waits_of_updates(GRPOModule(mini_batch_size=4, **sampled), groups, monkeypatch) == [["tolist"]] * 2


RANKED = [(prompt, [first, second, first[::-1]], [0, 1, 1]) for prompt, first, second in random_pairs(4)]


@pytest.mark.parametrize(
    "kind",
    [
        RewardModule,
        PlackettLuceModule,
        CostModule,
        AttributesRewardModule,
        ProcessRewardModule,
    ],  # fmt: skip
)
def test_an_update_of_a_reward_model_waits_for_its_pairs_and_once_more(
    kind: Any, policy_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is ProcessRewardModule:
        step: Any = Step(tuple(judged_steps(random_rows(3, seed=n), [1.0] * 3) for n in range(2)), 6, 30)
    elif kind is AttributesRewardModule:
        step = demonstration_step(random_rows(4), 2)
    else:
        step = ranked_step(RANKED, 2, target=[1.0, 1.0, 0.5, 1.0])
    numbers = {name: torch.tensor([0.0, 1.0]) for name in kind.data_columns}
    step = step._replace(micro_batches=tuple(batch._replace(extras=numbers) for batch in step.micro_batches))
    module = kind(init_from=policy_folder, lr_schedule="constant")
    pairs = 0 if kind in (PlackettLuceModule, AttributesRewardModule, ProcessRewardModule) else 2
    # A loss of pairs finds those of its ranks, which an objective may change, once per micro-batch.
    assert waits_of_updates(module, [step, step], monkeypatch) == [["nonzero"] * pairs + ["tolist"]] * 2


def test_checks_wait_for_the_next_read_and_means_need_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, told = quiet_trainer().strategy, list[float]()
    meter = Meter()
    meter.add("x", torch.tensor([1.0, 3.0]))
    meter.when_read(torch.tensor(7.0), told.append)
    assert told == []
    assert meter.read(strategy, torch.tensor(2.0), torch.tensor(5.0)) == (2.0, 5.0)
    assert told == [7.0]
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "double", None)  # a second read would need it
        assert meter.means(strategy) == {"x": 2.0}
    meter.add("x", torch.tensor([5.0]))
    assert meter.means(strategy) == {"x": 3.0} and told == [7.0]


def test_copies_to_a_gpu_are_pinned_and_copies_to_the_host_are_not_asynchronous(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pinned: list[Tensor] = []
    moved: list[tuple[str, bool]] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(Tensor, "to", lambda self, device, non_blocking: moved.append((device, non_blocking)) or self)
    ids = torch.arange(3)
    for device in ("cuda:1", "cpu"):
        transfer.to_device(ids, device)
    assert pinned == [ids] and moved == [("cuda:1", True), ("cpu", False)]
