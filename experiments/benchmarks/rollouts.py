"""Rollouts, timed: the slots of `SlotEngine` against transformers' ``generate`` on the static batch, same episodes.

    python experiments/benchmarks/rollouts.py --model DIR [--slots N] [--samples N] ...

Completion lengths are geometric: the end token has the same probability at every position, whatever the model says, so
lengths are addressed like the tokens and both engines draw the same. Prompts are random tokens of mixed lengths. Both
run in turns; figures are completion tokens a second, medians over the turns.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from rlhf_lightning.models import generate_engine, sampling
from rlhf_lightning.models.causal_lm import CausalLM, load_policy
from rlhf_lightning.models.generate_engine import GenerateEngine
from rlhf_lightning.models.sampling import Completions, SamplingEngine, SamplingSettings, SlotEngine


def ending_at(rate: float, end: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return `sampling.draw` with an end token whose probability is ``rate`` at every position."""
    drawn_by = sampling.draw

    def draw(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        logits = logits.clone()
        logits[:, end] = -torch.inf
        logits[:, end] = logits.logsumexp(-1) + math.log(rate / (1 - rate))
        return drawn_by(logits, *args)

    return draw


def timed(engine: SamplingEngine, model: CausalLM, args: argparse.Namespace, slots: int | None) -> tuple[Any, float]:
    """Return what an engine draws for the prompts, and the completion tokens it makes in a second."""
    generator = torch.Generator().manual_seed(args.seed)
    lengths = torch.randint(args.shortest, args.longest + 1, (args.prompts // args.samples,), generator=generator)
    vocabulary = model.model.config.vocab_size
    prompts = [torch.randint(vocabulary, (int(length),), generator=generator) for length in lengths]
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    settings = SamplingSettings(args.cap, batch_size=slots)
    begun = time.perf_counter()
    drawn = engine.sample(model, repeated, torch.arange(len(repeated)), settings, args.seed, [args.end])
    return drawn, sum(len(ids) for ids in drawn.ids) / (time.perf_counter() - begun)


def same(one: Completions, other: Completions) -> bool:
    """Whether two engines drew the same episodes."""
    pairs = zip(one.ids, other.ids, strict=True)
    return torch.equal(one.finished, other.finished) and all(torch.equal(a, b) for a, b in pairs)


def main() -> None:
    """Print one line of JSON: tokens per second of both engines in each turn, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=64, help="completions in all")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--slots", type=int, default=None, help="slots of our engine; as many as completions if unset")
    parser.add_argument("--mean", type=float, default=24, help="mean completion length, tokens")
    parser.add_argument("--cap", type=int, default=96, help="longest completion, tokens")
    parser.add_argument("--shortest", type=int, default=16, help="shortest prompt, tokens")
    parser.add_argument("--longest", type=int, default=48, help="longest prompt, tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_policy(args.model).eval()
    args.end = model.model.config.eos_token_id
    sampling.draw = generate_engine.draw = ending_at(1 / args.mean, args.end)
    rates: dict[str, list[float]] = {"slots": [], "generate": []}
    for _ in range(args.turns):
        ours, rate = timed(SlotEngine(), model, args, args.slots)
        rates["slots"].append(round(rate, 1))
        theirs, rate = timed(GenerateEngine(), model, args, None)
        rates["generate"].append(round(rate, 1))
        assert same(ours, theirs), "the engines drew different episodes"
    lengths = [len(ids) for ids in ours.ids]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    figures = {
        "completions": len(lengths),
        "mean_length": round(statistics.mean(lengths), 1),
        "longest": max(lengths),
        "tokens_per_second": rates,
        "ratio": round(medians["slots"] / medians["generate"], 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
