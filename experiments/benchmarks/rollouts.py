"""Time rollouts: continuous batching in `SlotEngine` against transformers' ``generate`` on a static batch.

    python experiments/benchmarks/rollouts.py --model DIR [--slots N] [--samples N] ...

Completion lengths are geometric: the end token has the same probability at every position, independent of the model.
Lengths and tokens use the same addressed random numbers, so both engines draw the same episodes. The engines alternate.
Figures are completion tokens per second of wall time and of processor time (steadier on a shared machine), as medians
over the turns.

A random number within rounding error of the boundary between two tokens may draw either of them. Up to one episode in a
hundred may therefore differ from such a token on. All other episodes must be equal, and so must the log-probabilities
before the first difference.
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
from transformers import AutoTokenizer

from rlhf_lightning import tokenization
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.sampling import drawing, generate_engine, slot_engine
from rlhf_lightning.sampling.engines import Completions, SamplingEngine, SamplingSettings
from rlhf_lightning.sampling.generate_engine import GenerateEngine
from rlhf_lightning.sampling.slot_engine import SlotEngine

QUESTIONS = (
    "What is {}?",
    "Write one sentence about {} for a child.",
    "I have to give a short talk about {} tomorrow morning. What should I say first, and what can I leave out?",
    "Name three facts about {}, and say of each in a few words why it matters to those who work with it every day.",
)
TOPICS = (
    "the moon", "bread", "a bicycle", "the sea", "photosynthesis", "chess", "a volcano", "rice", "the printing press",
    "a violin", "winter", "paper", "bees", "the Nile", "a magnet", "glass",
)  # fmt: skip


def ending_at(rate: float, end: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a variant of `drawing.draw` that draws an end token with probability ``rate`` at every position."""
    drawn_by = drawing.draw

    def draw(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        logits = logits.clone()
        logits[:, end] = -torch.inf
        logits[:, end] = logits.logsumexp(-1) + math.log(rate / (1 - rate))
        return drawn_by(logits, *args)

    return draw


def prompts_of(tokenizer: Any, count: int, samples: int) -> list[Tensor]:
    """Return the token ids of questions of different lengths, each repeated ``samples`` times."""
    asked = [question.format(topic) for topic in TOPICS for question in QUESTIONS][: count // samples]
    messages = [[{"role": "user", "content": text}] for text in asked]
    return [torch.tensor(tokenization.encode_prompt(tokenizer, prompt)) for prompt in messages for _ in range(samples)]


def timed(
    engine: SamplingEngine, model: CausalLM, prompts: list[Tensor], args: argparse.Namespace, slots: int | None
) -> tuple[Completions, list[float]]:
    """Return the episodes that an engine draws, and its completion tokens per second of wall time and of processor
    time.
    """
    settings = SamplingSettings(args.cap, batch_size=slots)
    begun, worked = time.perf_counter(), time.process_time()
    drawn = engine.sample(model, prompts, torch.arange(len(prompts)), settings, args.seed, [args.end])
    spent = time.perf_counter() - begun, time.process_time() - worked
    return drawn, [round(sum(len(ids) for ids in drawn.ids) / seconds, 1) for seconds in spent]


def different(one: Completions, other: Completions) -> int:
    """Return how many episodes two engines drew differently. Log-probabilities must agree up to the
    first difference.
    """
    count = 0
    for ours, theirs, ours_said, theirs_said in zip(one.ids, other.ids, one.logprobs, other.logprobs, strict=True):
        shared = min(len(ours), len(theirs))
        parted = (ours[:shared] != theirs[:shared]).nonzero().flatten().tolist()
        upto = parted[0] if parted else shared
        torch.testing.assert_close(ours_said[:upto], theirs_said[:upto], atol=1e-3, rtol=0)
        count += bool(parted) or len(ours) != len(theirs)
    return count


def main() -> None:
    """Print one line of JSON: tokens per second of both engines in each turn, and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=64, help="completions in all")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--slots", type=int, default=None, help="slots of our engine; as many as completions if unset")
    parser.add_argument("--mean", type=float, default=24, help="mean completion length, tokens")
    parser.add_argument("--cap", type=int, default=96, help="longest completion, tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load_policy(args.model).eval(), AutoTokenizer.from_pretrained(args.model)
    model.sampling_checked = True  # the check expects the model's own distribution
    args.end = tokenization.end_token_ids(tokenizer)[0]
    slot_engine.draw = generate_engine.draw = ending_at(1 / args.mean, args.end)
    prompts = prompts_of(tokenizer, args.prompts, args.samples)
    rates: dict[str, list[list[float]]] = {"slots": [], "generate": []}
    for _ in range(args.turns):
        ours, rate = timed(SlotEngine(), model, prompts, args, args.slots)
        rates["slots"].append(rate)
        theirs, rate = timed(GenerateEngine(), model, prompts, args, None)
        rates["generate"].append(rate)
        assert different(ours, theirs) <= len(prompts) / 32, f"{different(ours, theirs)} episodes differ"
    lengths = [len(ids) for ids in ours.ids]
    ours_per, theirs_per = ([statistics.median(turn) for turn in zip(*found, strict=True)] for found in rates.values())
    figures = {
        "completions": len(lengths),
        "mean_length": round(statistics.mean(lengths), 1),
        "longest": max(lengths),
        "different": different(ours, theirs),
        "tokens_per_second_wall_cpu": rates,
        "ratio_wall": round(ours_per[0] / theirs_per[0], 2),
        "ratio_cpu": round(ours_per[1] / theirs_per[1], 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
