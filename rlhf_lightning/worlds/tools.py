"""The tool world: a small shop in which a policy learns to look up prices and add them, and a quiz about prices.

A request names two items, such as ``pear and fig``. Each row has its own prices from 1 to 9, which only the tool
``price`` knows; the tool ``add`` adds two numbers. The best policy makes two turns of calls and then copies the sum::

    call: price(key="pear")
    call: price(key="fig")        -> 7, 5
    call: add(a=7, b=5)            -> 12
    12

The **gold reward** is 1 for the right sum and 0 otherwise, so the optimum is 1. A policy without tools can only guess:
the best guess, 10, is right in 9 of 81 cases. Few of the writers of demonstrations use both tools, so a policy that
imitates them earns about a quarter of the gold reward. Each right turn is still common enough to be found.

The **quiz** asks for the prices of six items, one in each turn. These prices are the same in all rows, so a policy can
learn them from rewards alone: the optimum is 6, and random prices earn 6/9.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.environments.tool_use import LookupTable, ToolEnvironment
from rlhf_lightning.types import Episode, Message, Prompt, Reply
from rlhf_lightning.worlds._assistant_text import llama_config, wrapped_tokenizer

Row = dict[str, Any]

THINGS = (
    "pear", "fig", "plum", "lime", "kiwi", "corn", "leek", "bean", "rice", "milk", "salt", "tea", "soap", "bread",
    "egg", "nut", "jam", "oil", "fish", "cake",
)  # fmt: skip
CAREFUL, HALF = 0.2, 0.3
"""Shares of writers who use both tools, and who only look up the prices; the others guess immediately."""

LIST_PRICES = {thing: 1 + 4 * place % 9 for place, thing in enumerate(THINGS)}
"""The prices of the quiz, 1 to 9."""

QUIZ_TURNS = 6

SPECIAL = ("<|pad|>", "<|unk|>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>")
PIECES = (
    'call: price(key="', '")', "call: add(a=", ", b=", ")", "\n", " and ", " ", "error: ", "price", "add",
)  # fmt: skip
TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}{{ 'call: ' + call.function.name + '(' }}"
    "{% for name, value in call.function.arguments.items() %}{{ name + '=' + value | tojson }}"
    "{% if not loop.last %}{{ ', ' }}{% endif %}{% endfor %}{{ ')' }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


class ShopEnvironment(ToolEnvironment):
    """Environment with the shop's tools: ``price``, which reads a row's ``prices``, and ``add``.

    Args:
        reward: see `ToolEnvironment`.
    """

    def __init__(self, reward: dict[str, float] | None = None) -> None:
        price = LookupTable(name="price", about="Look up the price of an item.", column="prices")
        super().__init__([price, add], reward, call_format="plain")


def gold(prompts: Sequence[Prompt], completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> list[float]:
    """Score 1 for each answer that is the right sum, else 0; the scorer of the shop."""
    return [float(text.strip() == str(right)) for text, right in zip(completions, answer, strict=True)]


def request(rng: random.Random) -> Row:
    """Return a random row of the shop: a prompt, the prices of its items, and the answer."""
    first, second = rng.sample(THINGS, 2)
    prices = {first: rng.randint(1, 9), second: rng.randint(1, 9)}
    turn = {"role": "user", "content": f"{first} and {second}"}
    return {"prompt": [turn], "prices": prices, "answer": str(prices[first] + prices[second])}


def demonstration(rng: random.Random, row: Row) -> list[Message]:
    """Return a writer's conversation about a row; the writer's care is random."""
    (first, one), (second, two) = row["prices"].items()
    kind = rng.random()
    turns: list[Message] = [*row["prompt"]]
    turns[0] = {**turns[0], "tools": ShopEnvironment().descriptions}
    if kind < CAREFUL + HALF:
        turns.append(_said(f'call: price(key="{first}")\ncall: price(key="{second}")'))
        turns += [{"role": "tool", "content": str(one)}, {"role": "tool", "content": str(two)}]
    if kind < CAREFUL:
        turns += [_said(f"call: add(a={one}, b={two})"), {"role": "tool", "content": row["answer"]}]
    return [*turns, _said(row["answer"] if kind < CAREFUL else str(rng.randint(2, 18)))]


class PriceQuiz:
    """Quiz: each turn names an item of a row's ``items``, and the policy says the item's price in `LIST_PRICES`.

    Args:
        reward: "turn" pays 1 for a right price in its own turn; "final" pays their number in the last turn.
    """

    def __init__(self, reward: Literal["turn", "final"] = "turn") -> None:
        self.when = reward

    def reset(self, row: Mapping[str, Any]) -> Prompt:
        """Return the data's prompt, which names the first item."""
        return row["prompt"]

    def reply(self, episode: Episode) -> Reply:
        """Return the next item, and the reward."""
        items, right = episode.row["items"], right_prices(episode.row["items"], episode.messages)
        asked = len(right)
        done = asked == len(items)
        reward = float(right[-1] if self.when == "turn" else sum(right) * (done or episode.last))
        return Reply(reward=reward, done=True) if done else Reply(items[asked], reward=reward)


def right_prices(items: Sequence[str], messages: Sequence[Message]) -> list[bool]:
    """Return for each answer of a quiz whether it is the price of its item."""
    said = [turn["content"].strip() for turn in messages if turn["role"] == "assistant"]
    return [answer == str(LIST_PRICES[item]) for item, answer in zip(items, said, strict=False)]


def quiz(rng: random.Random) -> Row:
    """Return a random row of the quiz."""
    items = rng.sample(THINGS, QUIZ_TURNS)
    return {"prompt": [{"role": "user", "content": items[0]}], "items": items}


def quizzed(rng: random.Random) -> list[Message]:
    """Return a conversation about a random row of the quiz, with random prices."""
    return [
        turn
        for item in quiz(rng)["items"]
        for turn in ({"role": "user", "content": item}, _said(str(rng.randint(1, 9))))
    ]


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def write_world(folder: str | Path, seed: int = 0, rows: int = 4000, held_out: int = 200) -> Path:
    """Write the world's files to ``folder``, and return the folder.

    Files: demonstrations.jsonl, prompts_train.jsonl and prompts_test.jsonl of the shop; quiz_sft.jsonl,
    quiz_train.jsonl and quiz_test.jsonl of the quiz; and model/ (configuration, tokenizer, chat template; no weights).

    Args:
        folder: created if missing.
        seed: the same seed gives the same rows.
        rows: number of demonstrations, and number of training prompts.
        held_out: number of held-out prompts.
    """
    rng, folder = random.Random(seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "demonstrations": [{"messages": demonstration(rng, request(rng))} for _ in range(rows)],
        "prompts_train": [request(rng) for _ in range(rows)],
        "prompts_test": [request(rng) for _ in range(held_out)],
        "quiz_sft": [{"messages": quizzed(rng)} for _ in range(rows)],
        "quiz_train": [quiz(rng) for _ in range(rows)],
        "quiz_test": [quiz(rng) for _ in range(held_out)],
    }
    for name, many in files.items():
        write_lines(folder / f"{name}.jsonl", many)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    llama_config(tokenizer, hidden_size=64, layers=2, heads=4, intermediate_size=192).save_pretrained(folder / "model")
    return folder


def make_tokenizer() -> Any:
    """Return the world's ``PreTrainedTokenizerFast`` with one token for each piece of calls, each number and item."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pieces = [*PIECES, *THINGS, *map(str, range(19))]
    words = {piece: index for index, piece in enumerate([*SPECIAL, *pieces])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    longest = sorted(pieces, key=len, reverse=True)
    pattern = "|".join("".join(f"\\x{{{ord(letter):x}}}" for letter in piece) for piece in longest)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return wrapped_tokenizer(backend, SPECIAL[3:], TEMPLATE)
