"""Settings of ``rlhf loop``."""

from dataclasses import dataclass
from typing import Literal

from rlhf_lightning.errors import check_range
from rlhf_lightning.people.labeller import Labeller
from rlhf_lightning.recipes import resolve_recipe


@dataclass
class LoopSettings:
    """Run rounds of sampling, labelling, training and evaluation; each round learns from all labels so far.

    Each round has a folder ``RUNS_FOLDER/NAME/round_<k>`` with its feedback store, its runs and its completions on
    held-out prompts. ``state.json`` records finished steps: the same command resumes an interrupted loop. If too many
    pairs are skipped, further ones are sampled; if the policy gives no more, the round uses the labels it has.

    Args:
        name: name of the loop and of its folder.
        init_from: policy that the first pairs are sampled from, where training starts and KL is measured from.
        prompts: file of prompts, in any form that `rlhf generate` reads.
        eval_prompts: file of held-out prompts.
        reward_config: `rlhf fit` config of the reward model; start, data, seeds and folders are filled in.
        policy_config: `rlhf fit` config of the policy: any objective on preferences, or on-policy.
        labeller: the Labeller, by class_path and init_args.
        rounds: number of rounds; a higher number continues a finished loop.
        labels: labels of each round.
        pool: pairs sampled in each round; by default a quarter more than labels.
        select: order of the pairs, as in `rlhf annotate --select`, by the reward models of the round before; the first
            round is in random order. null keeps the order of sampling.
        members: reward models of each round, with different seeds; the policy is trained on their mean score.
        start: policy that each round starts training from: first (init_from) or latest (of the round before).
        gold_reward: import path of a function (prompt, completion) -> known true reward, for evaluation only.
        scorer: scorer of held-out completions without a gold reward; by default the round's reward models.
        annotators_per_item: annotators for each pair.
        repeats: share of pairs shown again with sides swapped, to measure consistency.
        temperature: softmax temperature of sampling.
        max_new_tokens: maximum length of a completion, tokens.
        batch_size: completions decoded at the same time.
        runs_folder: folder of loops.
        seed: seed of sampling, sides, weights and data order.
    """

    name: str
    init_from: str
    prompts: str
    eval_prompts: str
    reward_config: str
    policy_config: str
    labeller: Labeller
    rounds: int = 3
    labels: int = 100
    pool: int | None = None
    select: str | None = None
    members: int = 1
    start: Literal["first", "latest"] = "first"
    gold_reward: str | None = None
    scorer: str | None = None
    annotators_per_item: int = 1
    repeats: float = 0.0
    temperature: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 64
    runs_folder: str = "runs/loop"
    seed: int = 0

    def __post_init__(self) -> None:
        self.reward_config, self.policy_config = resolve_recipe(self.reward_config), resolve_recipe(self.policy_config)
        for name in ("rounds", "labels", "members", "annotators_per_item", "batch_size"):
            check_range(getattr(self, name) >= 1, "it must be 1 or more", **{name: getattr(self, name)})
        check_range(
            self.pairs * self.annotators_per_item >= self.labels,
            f"it must be {-(-self.labels // self.annotators_per_item)} or more, as {self.annotators_per_item} of "
            f"{self.labels} labels go to each pair",
            pool=self.pool,
        )

    @property
    def pairs(self) -> int:
        """Pairs sampled in each round."""
        return self.pairs_for(self.labels) if self.pool is None else self.pool

    def pairs_for(self, labels: int) -> int:
        """Pairs for so many labels, and a quarter more because some are skipped."""
        items = -(-labels // self.annotators_per_item)
        return items + -(-items // 4)
