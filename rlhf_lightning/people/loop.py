"""``rlhf loop``: settings, and the command."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import docstring_parser
from jsonargparse import ActionConfigFile

import rlhf_lightning.people.simulated  # noqa: F401  labellers by their short names
from rlhf_lightning.commands.parsing import PlainParser, with_underscores
from rlhf_lightning.errors import SettingError
from rlhf_lightning.people.labeller import Labeller
from rlhf_lightning.recipes import resolve_recipe


@dataclass
class LoopSettings:
    """Rounds of sampling, labelling, training and evaluation; each round learns from all labels there are.

    A round is the folder ``RUNS_FOLDER/NAME/round_<k>``: its store of labels, the run folders of its stages, and its
    completions on held-out prompts. What is done is in ``state.json``: the same command goes on where it was cut off.
    Where more pairs are skipped than there are to spare, further ones are sampled; where the policy has none, the round
    goes on with the labels it has.

    Args:
        name: of the loop, and of its folder.
        init_from: folder of the policy that the first pairs are sampled from, that training starts from and that the KL
            is measured from; mostly an SFT model.
        prompts: file of prompts, in any form that `rlhf generate` reads.
        eval_prompts: file of held-out prompts.
        reward_config: YAML file of `rlhf fit` for the reward model; start, data, seeds and folders are filled in.
        policy_config: the same for the policy: any objective that learns from preferences, or on-policy from scores.
        labeller: who labels; a Labeller, by class_path and init_args.
        rounds: how many; more than before goes on with a loop that was done.
        labels: labels of each round.
        pool: pairs sampled in each round, from which `select` chooses; by default a quarter more than `labels`.
        select: which pair is labelled next, as `rlhf annotate --select` takes it; reward models are those of the round
            before, so that the first round is in random order. None takes them as they were sampled.
        members: reward models trained in each round, with different seeds; disagreement needs two or more. The policy
            is trained on their mean score.
        start: what each round's training starts from: ``first`` is init_from, ``latest`` is the policy of the round
            before.
        gold_reward: import path of a function (prompt, completion) -> known true reward; evaluation alone uses it.
        scorer: what judges held-out completions where there is no gold reward: anything `--model.scorer` takes; by
            default the round's own reward models.
        annotators_per_item: how many judge each pair.
        repeats: share of pairs shown again with sides swapped, to measure consistency.
        temperature: of the sampling; logits are divided by it.
        max_new_tokens: longest completion, tokens.
        batch_size: completions decoded side by side.
        runs_folder: where loops are kept.
        seed: of sampling, sides, weights and order.
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
            if getattr(self, name) < 1:
                raise SettingError("setting-out-of-range", f"{name} is {getattr(self, name)}: it must be 1 or more")
        if self.pairs * self.annotators_per_item < self.labels:
            raise SettingError(
                "setting-out-of-range",
                f"pool is {self.pool}, and {self.annotators_per_item} of {self.labels} labels go to each pair: it must "
                f"be {-(-self.labels // self.annotators_per_item)} or more",
            )

    @property
    def pairs(self) -> int:
        """Pairs sampled in each round."""
        return self.pairs_for(self.labels) if self.pool is None else self.pool

    def pairs_for(self, labels: int) -> int:
        """Pairs that so many labels want, and a quarter more: some are skipped."""
        items = -(-labels // self.annotators_per_item)
        return items + -(-items // 4)


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf loop``."""
    doc = docstring_parser.parse(inspect.getdoc(LoopSettings) or "")
    description = "\n\n".join(filter(None, [doc.short_description, doc.long_description]))
    parser = PlainParser(prog="rlhf loop", description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of the settings; flags win over it")
    parser.add_class_arguments(LoopSettings, as_group=False)
    given = parser.parse_args(with_underscores(argv))
    made = parser.instantiate(given).as_dict()
    plain, made = ({name: value for name, value in one.items() if name != "config"} for one in (given.as_dict(), made))

    from rlhf_lightning.people.loop_rounds import run_loop

    run_loop(LoopSettings(**made), plain)
    return 0
