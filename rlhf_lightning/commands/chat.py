"""``rlhf chat``: chat with a policy in the terminal."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import printable

if TYPE_CHECKING:
    from rlhf_lightning.types import Message, MultiTurn, Prompt

DEFAULTS = SamplingArguments(temperature=0.7)

TOKENS_AT_A_TIME = 8
"""Number of tokens sampled before each output."""
HELP = "/reset starts a new conversation, /quit (or Ctrl-D) ends; Ctrl-C stops an answer"


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf chat``."""
    return run_function(chat, argv, "rlhf chat", positional=["folder"], without=["batch_size"])


def chat(folder: str, system: str | None = None, sampling: SamplingArguments = DEFAULTS) -> int:
    """Chat with a policy.

    If the input is a pipe, each line is a turn, each answer is printed, and Ctrl-C ends the command. Without a chat
    template each line is continued as plain text, without the earlier turns. With --environment the environment replies
    to the policy's turns, for example to tool calls, until it ends the episode.

    Args:
        folder: folder of a policy (weights or adapter), .gguf file or hub id, such as runs/dpo/version_0/model.
        system: system prompt of each conversation.
        sampling: sampling settings; the same seed and lines give the same answers.
    """
    settings, engine = sampling.settings(), sampling.make_engine()
    policy, tokenizer = sampling.load(folder)
    rules = sampling.multi_turn()
    conversation = Conversation(policy, tokenizer, settings, sampling.seed, system, engine, rules)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{folder}\n{HELP}")
        if not conversation.has_turns:
            print("the tokenizer has no chat template: each line is continued as plain text")
    converse(conversation, lines(interactive), print, interactive)
    return 0


def lines(interactive: bool) -> Iterator[str]:
    """Yield the lines of input until it ends."""
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return


def converse(
    conversation: "Conversation", typed: Iterator[str], show: Callable[..., None], stoppable: bool = False
) -> None:
    """Answer each line; lines that start with a slash are commands. If ``stoppable``, Ctrl-C ends only the answer."""
    for line in typed:
        text = line.strip()
        if not text:
            continue
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            conversation.reset()
            show("(a new conversation)")
        elif text.startswith("/"):
            show(HELP)
        else:
            try:
                for piece in conversation.answer(text):
                    show(printable(piece), end="", flush=True)
            except KeyboardInterrupt:
                if not stoppable:
                    raise
                show(" (stopped)", end="")
            show("")


class Conversation:
    """A conversation with a policy; without a chat template earlier turns are not kept."""

    def __init__(
        self, policy: Any, tokenizer: Any, settings: Any, seed: int = 0, system: str | None = None, engine: Any = None,
        rules: "MultiTurn | None" = None,
    ) -> None:  # fmt: skip
        from rlhf_lightning.sampling.slot_engine import load_engine

        self.engine, self.rules = load_engine(engine), rules
        self.policy, self.tokenizer, self.settings, self.seed = policy, tokenizer, settings, seed
        self.system = system
        self.has_turns = tokenizer.chat_template is not None
        self.turns: list[Message] = []
        self.drawn, self.ended, self.ids = 0, False, list[int]()
        self.reset()

    def reset(self) -> None:
        """Delete all turns except the system prompt, and restart the random numbers."""
        self.turns = [{"role": "system", "content": self.system}] if self.system and self.has_turns else []
        self.drawn = 0

    def answer(self, text: str) -> Iterator[str]:
        """Yield the answer to a line in pieces. If it is stopped, the part that was shown stays in the conversation."""
        from rlhf_lightning import tokenization

        prompt: Prompt = text
        if self.has_turns:
            self.turns.append({"role": "user", "content": text})
            prompt = list(self.turns)
        if self.rules is not None:
            yield from self._episode(self.rules, prompt)
            return
        said = ""
        try:
            for piece in self._pieces(tokenization.encode_prompt(self.tokenizer, prompt)):
                said += piece
                yield piece
        finally:
            if self.has_turns:
                self.turns.append({"role": "assistant", "content": said or "…"})

    def _episode(self, rules: "MultiTurn", prompt: "Prompt") -> Iterator[str]:
        """Yield the policy's turns in pieces, and the environment's replies between them."""
        from rlhf_lightning import tokenization
        from rlhf_lightning.sampling.conversation import Turns

        prompt = rules.environment.reset({"prompt": prompt})
        turns = Turns(rules, self.tokenizer, [prompt], {}, [self.drawn])
        start = tokenization.encode_prompt(self.tokenizer, prompt)
        going = True
        try:
            while going:
                yield from self._pieces([*start, *turns.ids(0)])
                before = len(turns.transcripts()[0].messages) + 1
                going = turns.replies([0], [self.ids], [self.ended])[0]
                for turn in turns.transcripts()[0].messages[before:]:
                    yield f"\n[{turn['role']}: {turn['content']}]\n"
        finally:
            if self.has_turns:
                self.turns += turns.transcripts()[0].messages or ({"role": "assistant", "content": "…"},)

    def _pieces(self, prompt: Sequence[int]) -> Iterator[str]:
        """Sample a few tokens at a time, so that slow machines show progress.

        Afterwards ``ids`` holds the turn's tokens, and ``ended`` is true if the turn has an end token.
        """
        import torch

        from rlhf_lightning import tokenization

        start, ends = torch.tensor(prompt), tokenization.end_token_ids(self.tokenizer)
        shown, text, finished = "", "", False
        self.ids = ids = list[int]()
        while not finished and len(ids) < self.settings.max_new_tokens:
            tokens = min(TOKENS_AT_A_TIME, self.settings.max_new_tokens - len(ids))
            settings = replace(self.settings, max_new_tokens=tokens)
            context = torch.cat([start, torch.tensor(ids, dtype=torch.long)])
            drawn = self.engine.sample(self.policy, [context], torch.tensor([self.drawn]), settings, self.seed, ends)
            self.drawn += 1
            ids += drawn.ids[0].tolist()
            stop = ends.stop(ids)
            del ids[stop if stop is not None else len(ids) :]
            self.ended = finished = bool(drawn.finished[0]) or stop is not None
            text = tokenization.completion_text(self.tokenizer, ids)
            # An incomplete character decodes to U+FFFD. It is shown once the rest of it has been sampled. The
            # beginning of a possible stop string is held back in the same way.
            steady = text.rstrip("\ufffd")
            begun = (one[:length] for one in ends.strings for length in range(1, len(one)) if not finished)
            steady = steady[: len(steady) - max((len(one) for one in begun if steady.endswith(one)), default=0)]
            if steady.startswith(shown):
                yield steady[len(shown) :]
                shown = steady
        if text.startswith(shown):
            yield text[len(shown) :]
