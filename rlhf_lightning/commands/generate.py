"""``rlhf generate``: sample completions for a file of prompts; also shared code of all commands that sample."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning.atomic_files import refuse_special, write_lines
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import MissingError, SettingError, check_range

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings
    from rlhf_lightning.types import MultiTurn, Prompt


@dataclass(frozen=True)
class SamplingArguments:
    """Sampling settings of a command; `run_function` makes each field a flag.

    Args:
        temperature: softmax temperature; 0 is greedy decoding.
        max_new_tokens: longest completion in tokens.
        top_p: sample from the smallest set of tokens with this probability.
        top_k: sample from this many most probable tokens; 0 keeps all.
        batch_size: completions decoded in one batch, or concurrent requests.
        engine: SlotEngine (default), GenerateEngine, your own, or {class_path: RemoteEngine, ...}.
        environment: replies to the policy's turns, by class_path and init_args; null samples one completion.
        max_turns: maximum number of the policy's turns, with an environment.
        max_episode_tokens: maximum tokens after the first prompt, with an environment; null for no limit.
        chat_template: chat template to use instead of the tokenizer's own.
        template_args: variables of the chat template, as in '{enable_thinking: false}'.
        stop_tokens: further tokens that end a completion.
        stop_strings: texts that end a completion; they are not part of its text.
        dtype: precision of the weights, float32 or bfloat16.
        seed: seed of all random choices of the command.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 16
    engine: dict[str, Any] | str | None = None
    environment: dict[str, Any] | str | None = None
    max_turns: int = 8
    max_episode_tokens: int | None = None
    chat_template: str | None = None
    template_args: dict[str, Any] | None = None
    stop_tokens: list[str] | None = None
    stop_strings: list[str] | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_range(self.batch_size >= 1, "it must be at least 1", batch_size=self.batch_size)

    def settings(self) -> "SamplingSettings":
        """Return the engine's settings; raise a SettingError if a value is out of range."""
        from rlhf_lightning.sampling.engines import SamplingSettings

        return SamplingSettings(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.batch_size)

    def make_engine(self) -> "SamplingEngine":
        """Load the engine; raises as `loading.load` does."""
        from rlhf_lightning.sampling.slot_engine import load_engine

        return load_engine(self.engine)

    def multi_turn(self) -> "MultiTurn | None":
        """Load the environment; None without one. Raises as `environments.conversing` does."""
        from rlhf_lightning.environments import conversing

        if self.environment is None:
            return None
        return conversing(self.environment, self.max_turns, self.max_episode_tokens)

    def find(self, model: str) -> str:
        """Return the folder of a policy, without loading it.

        Raises:
            MissingError: the folder does not exist, or has no config.json.
            ModelError: it is a reward model.
        """
        from rlhf_lightning.models.resolving import is_adapter, resolve_folder
        from rlhf_lightning.models.roles import refuse_reward_model

        name = resolve_folder(model)
        if Path(name).is_dir() and not is_adapter(name) and not (Path(name) / "config.json").is_file():
            raise MissingError("no-model", f"{model} is not a model folder: it has no config.json")
        refuse_reward_model(name)
        return name

    def load(self, model: str) -> "tuple[CausalLM, PreTrainedTokenizerBase]":
        """Load a policy and its tokenizer onto the best device.

        Raises:
            MissingError: the folder does not exist, or has no weights.
            ModelError: it is a reward model.
        """
        from rlhf_lightning.models.roles import load_frozen
        from rlhf_lightning.models.self_check import check_weights
        from rlhf_lightning.tokenization import load_tokenizer

        name = self.find(model)
        tokenizer = load_tokenizer(
            name,
            self.chat_template,
            template_args=self.template_args,
            stop_tokens=self.stop_tokens or (),
            stop_strings=self.stop_strings or (),
        )
        policy = load_frozen(name, self.dtype)
        check_weights(policy)
        return policy, tokenizer

    def provenance(self) -> dict[str, Any]:
        """Return the settings that the samples depend on, without model and seed, as plain values."""
        drawn = {name: value for name, value in asdict(self.settings()).items() if name != "batch_size"}
        further = {"engine": self.engine, "stop_tokens": self.stop_tokens, "stop_strings": self.stop_strings}
        drawn |= {name: value for name, value in further.items() if value is not None}
        if self.environment is None:
            return drawn
        limits = {"max_turns": self.max_turns, "max_episode_tokens": self.max_episode_tokens}
        return {**drawn, "environment": self.environment, **limits}


DEFAULTS = SamplingArguments()

ONE_TURN = ("environment", "max_turns", "max_episode_tokens")
"""Settings that commands without environments leave out."""

CHUNKS_AT_ONCE = 8
"""Batches passed to the engine in one call: it sorts prompts by length, so a larger call has less padding."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf generate``."""
    return run_function(generate, argv, "rlhf generate")


def generate(
    model: str,
    prompts: str,
    out: str,
    samples: int = 1,
    scorer: dict[str, Any] | str | None = None,
    as_chat: bool = False,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Sample completions for each prompt of a file and write one JSON line per completion.

    Each line has prompt, sample, completion, logprob (the sum over its tokens at the sampling temperature), finished,
    length, score (with --scorer, which may add score_NAME and feedback) and the other columns of the prompt's row. The
    same seed gives the same completions for every batch size. With --environment a line is an episode: completion is
    the policy's last turn, turns holds all turns after the prompt, and the score includes the environment's reward.

    Args:
        model: folder of a policy (weights or adapter), .gguf file or hub id.
        prompts: file of prompts (.jsonl, .json, .csv, .parquet): a column prompt or messages, or training rows.
        out: JSONL file to write; it is created only when complete.
        samples: completions per prompt.
        scorer: scores the completions: folder of a reward model, function, or {class_path: ..., init_args: ...}.
        as_chat: put plain-text prompts into a user turn of the chat template.
        sampling: sampling settings.
    """
    check_range(samples >= 1, "it must be at least 1", samples=samples)
    sampling.settings()  # raises before anything is read
    refuse_overwriting(prompts, out)
    rows = read_prompts(prompts, as_chat)
    policy, tokenizer = sampling.load(model)
    hint_at_template(rows, tokenizer)
    score = None if scorer is None else scorer_beside(scorer, policy)
    speed = Speed(len(rows) * samples)
    answers = completions(policy, tokenizer, rows, samples, sampling, speed, score, scorer)
    write_lines(Path(out), answers)
    print(f"{out}: {speed.finish()}")
    return 0


def refuse_overwriting(source: str, out: str) -> None:
    """Refuse to overwrite the input file, and to write to a pipe, a device or a folder."""
    refuse_special(Path(out))
    if Path(source).is_file() and Path(out).is_file() and Path(source).samefile(out):
        raise SettingError("out-is-input", f"--out {out} is the file that is read; name another one")


def read_prompts(path: str, as_chat: bool) -> "list[tuple[Prompt, dict[str, Any]]]":
    """Return prompts with their other columns; print the number of rows without a prompt on stderr."""
    from rlhf_lightning.data.formats import prompt, read_row
    from rlhf_lightning.data.sources import usable_rows

    def read(row: Any) -> "tuple[Prompt, dict[str, Any]]":
        canonical = read_row(row, prompt, as_chat)
        assert canonical.prompt is not None
        return canonical.prompt, canonical.columns

    return usable_rows(path, read, "no usable prompt")


def hint_at_template(rows: "Sequence[tuple[Prompt, dict[str, Any]]]", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Suggest ``--as_chat`` on stderr if the tokenizer has a chat template and the first prompt is plain text."""
    if tokenizer.chat_template and isinstance(rows[0][0], str):
        print(
            "The prompts are plain text, and no chat template is applied although the tokenizer has one: --as_chat "
            "true puts each into a user turn, as an instruction-tuned model expects.",
            file=sys.stderr,
        )


def scorer_beside(spec: dict[str, Any] | str, policy: "CausalLM") -> Any:
    """Load a scorer onto the policy's device."""
    from rlhf_lightning.scoring import load_scorer

    return load_scorer(spec).to(next(policy.parameters()).device)


def completions(
    policy: "CausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    rows: "Sequence[tuple[Prompt, dict[str, Any]]]",
    samples: int,
    sampling: SamplingArguments,
    speed: "Speed",
    score: Any = None,
    spec: dict[str, Any] | str | None = None,
    with_ids: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a row per completion, in the order of the prompts. Sample s of prompt p is episode p * samples + s.

    ``spec`` is how the user named the scorer ``score``.
    """
    import torch

    from rlhf_lightning import tokenization
    from rlhf_lightning.sampling.conversation import Turns
    from rlhf_lightning.scoring.scorer import Judgements, ask_scorer

    ends = tokenization.end_token_ids(tokenizer)
    name = f"scorer {spec!r}" if isinstance(spec, str) else type(score).__name__
    engine, settings, rules = sampling.make_engine(), sampling.settings(), sampling.multi_turn()
    if rules is not None:
        rows = [(rules.environment.reset({**columns, "prompt": prompt}), columns) for prompt, columns in rows]
    at_once = max(sampling.batch_size * CHUNKS_AT_ONCE // samples, 1)
    for start in range(0, len(rows), at_once):
        chunk = rows[start : start + at_once]
        encoded = [torch.tensor(tokenization.encode_prompt(tokenizer, prompt)) for prompt, _ in chunk]
        repeated = [ids for ids in encoded for _ in range(samples)]
        episodes = torch.arange(start * samples, start * samples + len(repeated))
        owners = [row for row in chunk for _ in range(samples)]
        names = set().union(*(columns for _, columns in owners))
        further = {name: [columns.get(name) for _, columns in owners] for name in names}
        first = [prompt for prompt, _ in owners]
        turns = None if rules is None else Turns(rules, tokenizer, first, further, episodes.tolist())
        seed = sampling.seed
        drawn = engine.sample(policy, repeated, episodes, settings, seed, ends, speed.completed, turns=turns)
        drawn = drawn.decoded(tokenizer)
        texts = list(drawn.texts)
        judged = Judgements(torch.zeros(0)).plain()
        if score is not None:
            judged = ask_scorer(score, drawn.asked(first), texts, further, name).plain()
        speed.tokens += sum(drawn.lengths)
        for index, ((prompt, columns), text) in enumerate(zip(owners, texts, strict=True)):
            row: dict[str, Any] = {
                "prompt": prompt, "sample": index % samples, "completion": text,
                "logprob": float(drawn.logprobs[index].sum()), "finished": bool(drawn.finished[index]),
                "length": drawn.lengths[index],
            }  # fmt: skip
            if score is not None:
                row["score"] = judged[index].score
                row |= {f"score_{name}": value for name, value in judged[index].parts.items() if not math.isnan(value)}
                if judged[index].feedback is not None:
                    row["feedback"] = judged[index].feedback
            if drawn.transcripts:
                one = drawn.transcripts[index]
                row["turns"], row["reward"] = list(one.messages), None if one.failed else one.reward
                known = row.get("score", 0.0) is not None and not one.failed
                row["score"] = row.get("score", 0.0) + one.reward if known else None
            if with_ids:
                row["ids"] = drawn.ids[index].tolist()
                row["learned"] = None if drawn.learned is None else drawn.learned[index].tolist()
            yield {**columns, **row}


class Speed:
    """Show the progress of sampling ``total`` completions: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self.total, self.done, self.tokens = total, 0, 0
        self.began = self.printed = time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit="completion", disable=not self.on_terminal, dynamic_ncols=True)

    def completed(self, count: int) -> None:
        """Count finished completions."""
        self.done += count
        self.bar.set_postfix_str(f"{self.per_second:,.0f} tokens/s", refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if not self.on_terminal and now - self.printed >= 10:
            self.printed = now
            left = (now - self.began) / max(self.done, 1) * (self.total - self.done)
            print(f"{self.done}/{self.total} completions  {left:.0f} s left", file=sys.stderr, flush=True)

    @property
    def per_second(self) -> float:
        """Sampled tokens per second so far."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9)

    def finish(self) -> str:
        """Close the bar and return a summary."""
        self.bar.close()
        return f"{self.done:,} completions, {self.tokens:,} tokens, {self.per_second:,.0f} tokens/s"
