"""Compute the exact bias and variance of every sampler correction by summing over all completions of a small world.

The estimator is the policy gradient from one completion per prompt: weight * advantage * grad log policy, summed over
its tokens. The engine (the behaviour policy) draws completions; the gradient is that of the trainer's policy. All
completions are enumerated, so bias and variance are exact sums.

    python experiments/engines/corrections.py            # writes experiments/engines/corrections.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.functional.surrogates import off_policy_weights, sampler_weights, token_ratio
from rlhf_lightning.verification.table_model import IMPOSSIBLE
from rlhf_lightning.verification.world import EnumerableWorld

PAGE = Path(__file__).with_suffix(".md")
STEP_KL = 0.005
"""KL between successive policy versions, nats per token."""


class Drawn(NamedTuple):
    """Inputs of a correction: one row for each completion of each prompt, shape (rows, length)."""

    old: Tensor
    behaviour: Tensor
    mask: Tensor
    advantages: Tensor
    chance: Tensor  # probability of each completion under the engine, shape (rows,)


class Moments(NamedTuple):
    """Moments of the gradient estimate from one completion per prompt, relative to the norm of the true gradient."""

    bias: float
    deviation: float
    share: float  # fraction of tokens with weight 0

    def error(self, completions: int) -> float:
        """Return the root mean square error with this number of completions per prompt."""
        return float((self.bias**2 + self.deviation**2 / completions) ** 0.5)


class Scene:
    """A world with the trainer's and the engine's policy as tables of logits."""

    def __init__(self, world: EnumerableWorld, old: Tensor, behaviour: Tensor) -> None:
        self.world = world
        prefixes, tokens, mask = world.walks
        self.prefixes, self.tokens, self.mask = (part.flatten(0, 1) for part in (prefixes, tokens, mask))
        self.policy = torch.log_softmax(old, -1)
        engine = torch.log_softmax(behaviour, -1)
        rows = [torch.where(self.mask, logs[self.prefixes, self.tokens], 0.0) for logs in (self.policy, engine)]
        prompts = world.config.prompts
        chance = rows[0].sum(-1).exp().view(prompts, -1)
        baseline = (chance * world.rewards).sum(-1, keepdim=True)
        advantages = (world.rewards - baseline).flatten().unsqueeze(-1) * self.mask
        self.drawn = Drawn(rows[0], rows[1], self.mask, advantages, rows[1].sum(-1).exp())
        self.truth = self._means(torch.ones_like(rows[0]), rows[0].sum(-1).exp())[0]

    def token_kl(self) -> float:
        """Return KL(engine, trainer) in nats per token, averaged over tokens drawn by the engine."""
        gap = (self.drawn.behaviour - self.drawn.old) * self.mask
        tokens = (self.drawn.chance.unsqueeze(-1) * self.mask).sum()
        return float((self.drawn.chance.unsqueeze(-1) * gap).sum() / tokens)

    def moments(self, weights: Tensor) -> Moments:
        """Return bias and standard deviation of the estimator, given a weight for each token."""
        mean, squares = self._means(weights, self.drawn.chance)
        length = self.truth.square().sum()
        variance = squares - mean.square().sum()
        visits = self.drawn.chance.unsqueeze(-1) * self.mask
        share = (visits * (weights == 0)).sum() / visits.sum()
        bias = ((mean - self.truth).square().sum() / length).sqrt()
        return Moments(float(bias), float((variance / length).clamp_min(0).sqrt()), float(share))

    def _means(self, weights: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean gradient with respect to the logit table, and the mean squared norm, summed over prompts."""
        size = torch.where(self.mask, weights * self.drawn.advantages, 0.0)
        probabilities = self.policy.exp()
        mean = torch.zeros_like(probabilities)
        own = torch.nn.functional.one_hot(self.tokens, probabilities.shape[1]) - probabilities[self.prefixes]
        parts = size.unsqueeze(-1) * own  # all prefixes of a completion are different
        mean.index_put_((self.prefixes,), chance.view(-1, 1, 1) * parts, accumulate=True)
        return mean, (chance * parts.square().sum((-1, -2))).sum()


def bypass(drawn: Drawn, clip: float) -> Tensor:
    """Return the weight of PPO's clipped ratio policy / behaviour, with the engine's log-probabilities
    as the old ones.
    """
    ratio = token_ratio(drawn.old, drawn.behaviour)
    clipped = ((drawn.advantages > 0) & (ratio > 1 + clip)) | ((drawn.advantages < 0) & (ratio < 1 - clip))
    return torch.where(clipped, 0.0, ratio)


def normalised(drawn: Drawn, weights: Tensor) -> Tensor:
    """Divide by the mean weight over tokens drawn by the engine, which is the limit of a large batch."""
    visits = drawn.chance.unsqueeze(-1) * drawn.mask
    return weights / ((visits * weights).sum() / visits.sum())


def of(name: str, **bounds: float) -> Callable[[Drawn], Tensor]:
    """Return a correction of the package as a function of `Drawn`."""
    return lambda d: sampler_weights(name, d.old, d.behaviour, d.mask, **bounds)  # type: ignore[arg-type]


def off_policy(drawn: Drawn) -> Tensor:
    """Return the token correction, with completions masked that have a negative advantage and have become unlikely."""
    kept = off_policy_weights(drawn.old, drawn.behaviour, drawn.advantages, drawn.mask, 0.05)
    return of("token_truncate", high=2.0)(drawn) * kept


CORRECTIONS: dict[str, Callable[[Drawn], Tensor]] = {
    "none": lambda drawn: torch.ones_like(drawn.old),
    "token, no bound": of("token_truncate", high=1e9),
    "`token_truncate`, 2": of("token_truncate", high=2.0),
    "`token_truncate`, 0.5 to 2": of("token_truncate", high=2.0, low=0.5),
    "`token_truncate`, 2, normalised": lambda drawn: normalised(drawn, of("token_truncate", high=2.0)(drawn)),
    "`token_mask`, 0.5 to 5": of("token_mask", high=5.0),
    "sequence, no bound": of("sequence_truncate", high=1e9),
    "`sequence_truncate`, 2": of("sequence_truncate", high=2.0),
    "`sequence_truncate`, 5": of("sequence_truncate", high=5.0),
    "`sequence_mask`, 3": of("sequence_mask", high=3.0),
    "`sequence_mask`, 0.3 to 3": of("sequence_mask", high=3.0, low=0.3),
    "`geometric_mask`, 0.9 to 1.1": of("geometric_mask", high=1.1, low=0.9),
    "`token_truncate`, 2, off-policy mask 0.05": off_policy,
    "`bypass`, clip 0.2": lambda drawn: bypass(drawn, 0.2),
}


def step_size(world: EnumerableWorld, table: Tensor) -> tuple[float, Tensor]:
    """Return the step size that moves the policy by `STEP_KL` nats per token, and the exact policy gradient."""
    direction = Scene(world, table, table).truth
    low, high = 0.0, 1e4
    for _ in range(60):
        step = (low + high) / 2
        moved = Scene(world, table + step * direction, table).token_kl()
        low, high = (step, high) if moved < STEP_KL else (low, step)
    return low, direction


LEARNED = (
    "none", "`token_truncate`, 2", "`token_mask`, 0.5 to 5", "`sequence_truncate`, 2", "`sequence_truncate`, 5",
    "`sequence_mask`, 3", "`bypass`, clip 0.2",
)  # fmt: skip


def next_version(world: EnumerableWorld, table: Tensor) -> Tensor:
    """Return the logit table after one exact policy-gradient step of `STEP_KL` nats per token."""
    step, direction = step_size(world, table)
    return table + step * direction


def learned(world: EnumerableWorld, name: str, lag: int, updates: int = 40, speed: float = 1.0) -> float:
    """Return the expected reward after updates along the estimator's mean, with the engine ``lag`` versions behind."""
    step, _ = step_size(world, world.reference_table)
    tables = [world.reference_table]
    for number in range(updates):
        scene = Scene(world, tables[-1], tables[max(0, number - lag)])
        gradient, _ = scene._means(CORRECTIONS[name](scene.drawn), scene.drawn.chance)
        tables.append(tables[-1] + speed * step * gradient)
    return world.expected_reward(world.probabilities(tables[-1]))


def curves(lags: tuple[int, ...] = (0, 1, 2, 4, 8)) -> str:
    """Return the expected reward after 40 updates at each lag, for two step sizes."""
    world = EnumerableWorld(4, 4, 4, seed=0, reference_scale=1.0)
    before, best = world.expected_reward(world.problem.reference), float(world.rewards.amax(-1).mean())
    lines = [""]
    for speed in (1.0, 4.0):
        lines += [
            f"## Expected reward after 40 updates, step size {speed:g} (before: {before:.3f}; best: {best:.3f})",
            "",
        ]
        lines += ["| correction | " + " | ".join(f"lag {lag}" for lag in lags) + " |", "|---" * (len(lags) + 1) + "|"]
        for name in LEARNED:
            found = [learned(world, name, lag, speed=speed) for lag in lags]
            lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |")
        lines.append("")
    return "\n".join(lines)


def truncated(table: Tensor, top_p: float) -> Tensor:
    """Return the logits of a distribution truncated to its nucleus (top-p)."""
    ordered, index = torch.softmax(table, -1).sort(-1, descending=True)
    dropped = torch.zeros_like(table, dtype=torch.bool).scatter(-1, index, ordered.cumsum(-1) - ordered >= top_p)
    return table.masked_fill(dropped, IMPOSSIBLE)


def scenes(seed: int = 0, prompts: int = 8, tokens: int = 4, length: int = 5) -> dict[str, Scene]:
    """Return the trainer's policy with engines that are rounded, quantised, stale, or truncated."""
    world = EnumerableWorld(prompts, tokens, length, seed=seed, reference_scale=1.0)
    start = world.reference_table
    versions = [start]
    for _ in range(8):
        versions.append(next_version(world, versions[-1]))
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64)
    now = versions[-1]
    return {
        "rounding (noise 0.02)": Scene(world, now, now + 0.02 * noise),
        "8 bits (noise 0.1)": Scene(world, now, now + 0.1 * noise),
        "4 bits (noise 0.3)": Scene(world, now, now + 0.3 * noise),
        "lag 1": Scene(world, now, versions[-2]),
        "lag 2": Scene(world, now, versions[-3]),
        "lag 4": Scene(world, now, versions[-5]),
        "lag 8": Scene(world, now, versions[0]),
        "lag 4, noise 0.1": Scene(world, now, versions[-5] + 0.1 * noise),
        "top_p 0.9": Scene(world, now, truncated(now, 0.9)),
    }


def table(found: dict[str, Scene]) -> str:
    """Return the page's tables: relative bias, standard deviation, and error with 16 completions per prompt."""
    lines: list[str] = []
    moments = {name: {scene: of_scene.moments(weigh(of_scene.drawn)) for scene, of_scene in found.items()}
               for name, weigh in CORRECTIONS.items()}  # fmt: skip

    def add(title: str, cell: Callable[[Moments], str]) -> None:
        lines.extend(
            ["", f"## {title}", "", "| correction | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
        )
        lines.extend(
            f"| {name} | " + " | ".join(cell(moments[name][scene]) for scene in found) + " |" for name in moments
        )

    add("Bias", lambda one: f"{one.bias:.3f}")
    add("Standard deviation of one completion per prompt", lambda one: f"{one.deviation:.2f}")
    add("Root mean square error of 64 completions per prompt", lambda one: f"{one.error(64):.3f}")
    add("Root mean square error of 4096 completions per prompt", lambda one: f"{one.error(4096):.3f}")
    add("Share of tokens left out", lambda one: f"{one.share:.1%}")
    return "\n".join(lines)


def by_length(lengths: tuple[int, ...] = (3, 5, 7), names: tuple[str, ...] = (
    "none", "`token_truncate`, 2", "sequence, no bound", "`sequence_truncate`, 2", "`sequence_mask`, 3",
)) -> str:  # fmt: skip
    """Return the error of 64 completions per prompt at lag 2, for several maximum completion lengths."""
    found = {length: scenes(length=length, prompts=4)["lag 2"] for length in lengths}
    lines = ["", "## Root mean square error of 64 completions per prompt at lag 2, by longest completion", ""]
    lines += [
        "| correction | " + " | ".join(f"{length} tokens" for length in found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for name in names:
        errors = [scene.moments(CORRECTIONS[name](scene.drawn)).error(64) for scene in found.values()]
        lines.append(f"| {name} | " + " | ".join(f"{error:.3f}" for error in errors) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables, or write them between the markers of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print", action="store_true", dest="show")
    asked = parser.parse_args()
    found = scenes(asked.seed)
    measured = "KL(engine, trainer), nats per token: " + ", ".join(
        f"{name} {scene.token_kl():.5f}" for name, scene in found.items()
    )
    text = measured + ".\n" + table(found) + "\n" + by_length() + "\n" + curves()
    if asked.show or not PAGE.exists():
        print(text)
        return
    before, _, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->")
    PAGE.write_text(f"{before}<!-- table -->\n{text}<!-- end -->{after}")


if __name__ == "__main__":
    main()
