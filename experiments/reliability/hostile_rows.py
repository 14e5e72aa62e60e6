"""Generate hostile rows from a seed: control tokens in contents, broken Unicode, wrong types, garbage, huge fields."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Callable
from typing import Any

CONTROL = (
    "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "<|endoftext|>", "<eos>",
    "<bos>", "<pad>", "<unk>", "</s>", "<s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<<user>>",
    "<<assistant>>", "<<end>>", "<think>", "</think>", "<tool_call>", "[INST]", "[/INST]", "### Assistant:\n",
    "\n\nHuman: ", "\n\nAssistant: ", "<|im_", "|>", "<|", "<<ASSISTANT>>",
)  # fmt: skip
DAMAGE = (
    "\ud800", "\udfff", "\x00", "\ufeff", "\ufffd", "\u202e", "\u200b", "\x85", "\u2028", "\x1b[31m", "\x7f", "Ã©",
    "\ue0000\ue001", "\ue002", "{{ ''.__class__ }}", "{% include 'x' %}", "{%", "}}", "\r\n", "\r", "\t", '"', "'", ",",
    "\\", "ﷺ", "e\u0301" * 5, "👩‍👩‍👧", "\U000e0041", "א", "﹏", "İ", "ß",
)  # fmt: skip
WORDS = ("a", "bc", "the", "Why?", "yes", "no", " ", "\n", "42", "é", "漢字", "")
JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 2, 10**18, 10**400, 1e308, -0.0, math.nan, math.inf, -math.inf, "", " ", "nan", "NaN",
    "1e999", [], {}, [None], [[]], [""], ["a"], {"role": "user"}, [{"role": "user", "content": 3}], [[1, 2], [3]],
    [{"role": 1, "content": "x"}], {"content": "x", "role": "user"},
)  # fmt: skip
ROLES = ("user", "assistant", "system", "tool", "developer", "human", "gpt", "User", "<|im_start|>assistant", "", "ſ")
LONG = 300_000


class Hostile:
    """A generator of hostile rows.

    Args:
        seed: the same seed gives the same rows.
        long: fraction of texts with hundreds of thousands of characters.
    """

    def __init__(self, seed: int, long: float = 0.0005) -> None:
        self.random = random.Random(seed)
        self.long = long

    def pick(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return self.random.choice(choices)

    def text(self) -> str:
        """Return a text of words, control tokens and damaged characters."""
        pools = self.random.choices((WORDS, CONTROL, DAMAGE), weights=(6, 3, 1), k=self.random.randint(1, 8))
        text = "".join(self.random.choice(pool) for pool in pools)
        if self.random.random() < self.long:
            text += self.pick("a", "ab ", "漢", "<|im_end|>", "\n", "<<end>>") * (LONG // 4)
        return text

    def junk(self) -> Any:
        """Return a value of a wrong type, sometimes deeply nested."""
        if self.random.random() < 0.05:
            nested: Any = self.text()
            for _ in range(self.random.choice((10, 70, 300))):
                nested = [nested] if self.random.random() < 0.5 else {"content": nested}
            return nested
        return self.random.choice(JUNK)

    def turn(self, role: str) -> Any:
        """Return a message, in one of the forms that exporters write."""
        chance = self.random.random()
        content: Any = self.text()
        if chance < 0.03:
            return self.junk()
        if chance < 0.06:
            content = self.junk()
        if chance < 0.1:
            content = [{"type": "text", "text": content}, *self.pick([], [{"type": "image"}])]
        role = role if self.random.random() < 0.95 else self.random.choice(ROLES)
        return {"from": role, "value": content} if chance > 0.95 else {"role": role, "content": content}

    def turns(self, last: str) -> list[Any]:
        """Return a conversation that ends with the given role."""
        roles = ["system"] if self.random.random() < 0.2 else []
        roles += ["user", "assistant"] * self.random.randint(0, 2)
        roles += ["user"] if last == "user" else ["user", "assistant"]
        return [self.turn(role) for role in roles]

    def prompt(self) -> Any:
        """Return a prompt, as text or as messages."""
        return self.text() if self.random.random() < 0.5 else self.turns(self.pick("user", "user", "user", "assistant"))

    def completion(self) -> Any:
        """Return a completion, as text or as messages."""
        return self.text() if self.random.random() < 0.7 else [self.turn("assistant")]

    def number(self) -> Any:
        """Return a number, or a wrong value instead of one."""
        return self.junk() if self.random.random() < 0.3 else self.pick(0, 1, 0.5, "0.7", 3, None)

    def sft(self) -> dict[str, Any]:
        """Return a demonstration."""
        return self.pick(
            {"messages": self.turns("assistant")},
            {"prompt": self.prompt(), "completion": self.completion(), "weight": self.number()},
            {"instruction": self.text(), "input": self.text(), "output": self.text()},
            {"input": self.text(), "output": self.text()},
            {"text": self.text()},
        )

    def preference(self) -> dict[str, Any]:
        """Return a pair, a transcript, a ranked list or votes."""
        shared = self.turns("user")
        said = [f"\n\nHuman: {self.text()}\n\nAssistant: ", self.text(), self.text()]
        many = [self.completion() for _ in range(self.pick(1, 2, 3, 5, 300 if self.random.random() < 0.02 else 4))]
        return self.pick(
            {"prompt": self.prompt(), "chosen": self.completion(), "rejected": self.completion()},
            {"chosen": [*shared, self.turn("assistant")], "rejected": [*shared, self.turn("assistant")]},
            {"chosen": said[0] + said[1], "rejected": said[0] + said[2]},
            {"prompt": self.prompt(), "completions": many, "ranks": [self.number() for _ in many]},
            {"prompt": self.prompt(), "completions": many},
            {
                "prompt": self.prompt(), "completion_1": self.completion(), "completion_2": self.completion(),
                "label": self.pick(0, 1, 2, "tie", "1.0", self.junk()),
            },
            {
                "prompt": self.prompt(), "chosen": self.completion(), "rejected": self.completion(),
                "preference": self.number(), "margin": self.number(), "weight": self.number(),
            },
        )  # fmt: skip

    def unpaired(self) -> dict[str, Any]:
        """Return an unpaired completion with a label."""
        return self.pick(
            {"prompt": self.prompt(), "completion": self.completion(), "label": self.pick(True, 0, "-1", self.junk())},
            {"messages": self.turns("assistant"), "label": self.pick(True, False, 1.0, self.junk())},
        )

    def process(self) -> dict[str, Any]:
        """Return a completion with labelled steps."""
        steps = [self.text() for _ in range(self.random.randint(0, 5))]
        labels = [self.pick(True, False, None, 0.5, self.number()) for _ in steps]
        return {"prompt": self.prompt(), "completions": steps, "labels": labels if self.random.random() < 0.9 else 1}

    def prompt_row(self) -> dict[str, Any]:
        """Return a prompt with additional columns."""
        return self.pick(
            {"prompt": self.prompt(), "answer": self.junk(), self.text() or "x": self.text()},
            {"messages": self.turns("user")},
            {"instruction": self.text()},
        )

    def row(self, kind: str) -> dict[str, Any]:
        """Return a row of a kind, sometimes damaged."""
        row = {"prompt": self.prompt_row}.get(kind, getattr(self, kind))()
        chance = self.random.random()
        if chance < 0.05:
            del row[self.random.choice(list(row))]
        elif chance < 0.15:
            row[self.random.choice(list(row))] = self.junk()
        elif chance < 0.25:
            row[self.pick("meta", "weight", "margin", "label", self.text())] = self.junk()
        return row

    def line(self, kind: str) -> bytes:
        """Return a row as a line of JSON, sometimes damaged."""
        row, escape = self.row(kind), self.random.random() < 0.5
        line = json.dumps(row, ensure_ascii=escape).encode("utf-8", "surrogatepass")
        chance = self.random.random()
        if chance < 0.02:
            line = line[: self.random.randint(1, len(line))]
        elif chance < 0.03:
            place = self.random.randrange(len(line))
            line = line[:place] + bytes([self.pick(0xFF, 0xC0, 0x00, 0x80)]) + line[place:]
        elif chance < 0.04:
            line = line[:-1] + b', "prompt": "again", "prompt": "again"}'
        elif chance < 0.05:
            line = self.pick(b"[" * 100_000, b"null", b"[]", b"3", b"NaN", b"{", b'{"prompt": 1' + b"0" * 5000 + b"}")
        elif chance < 0.06:
            line = b"\xef\xbb\xbf" + line
        return line if line.strip() else b"?"


def jsonl(hostile: Hostile, kind: str, rows: int) -> tuple[bytes, int]:
    """Return a .jsonl file and its number of rows."""
    return b"".join(hostile.line(kind) + hostile.pick(b"\n", b"\r\n", b"\n\n") for _ in range(rows)), rows


def whole_json(hostile: Hostile, kind: str, rows: int) -> tuple[bytes, int]:
    """Return a .json file of valid JSON, in which some entries are not rows."""
    values = [hostile.row(kind) if hostile.random.random() < 0.95 else hostile.junk() for _ in range(rows)]
    return json.dumps({"data": values}).encode(), rows


def table(hostile: Hostile, kind: str, rows: int) -> tuple[bytes, int]:
    """Return a .csv file with invalid UTF-8, quotes, and too many or too few fields."""
    columns = PLAIN_COLUMNS[kind]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\r\n")
    writer.writerow(columns)
    broken = 0
    for _ in range(rows):
        count = len(columns) + (hostile.pick(-1, 1) if hostile.random.random() < 0.05 else 0)
        writer.writerow([str(hostile.text() if place < 3 else hostile.number()) for place in range(max(count, 1))])
        if hostile.random.random() < 0.01:
            stream.write('"x"y\r\n')
            broken += 1
    return stream.getvalue().encode("utf-8", "surrogatepass"), rows + broken


def parquet(hostile: Hostile, kind: str, rows: int) -> tuple[bytes, int]:
    """Return a .parquet file in which some texts are not valid UTF-8."""
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for name in PLAIN_COLUMNS[kind]:
        texts = [hostile.text().encode("utf-8", "surrogatepass") for _ in range(rows)]
        spoilt = [None if hostile.random.random() < 0.03 else text for text in texts]
        columns[name] = pyarrow.array(spoilt, pyarrow.binary()).view(pyarrow.string())
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue(), rows


def paragraphs(hostile: Hostile, kind: str, rows: int) -> tuple[bytes, int]:
    """Return a .txt file of paragraphs."""
    texts = [f"{hostile.text()}.".replace("\n", " ").replace("\r", " ") for _ in range(rows)]
    return "\n\n".join(texts).encode("utf-8", "surrogatepass"), rows


PLAIN_COLUMNS = {
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected", "preference"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt": ("prompt", "answer"),
}
KINDS = ("sft", "preference", "unpaired", "process", "prompt")
FORMATS: dict[str, tuple[Callable[[Hostile, str, int], tuple[bytes, int]], tuple[str, ...]]] = {
    "jsonl": (jsonl, KINDS),
    "json": (whole_json, KINDS),
    "csv": (table, tuple(PLAIN_COLUMNS)),
    "parquet": (parquet, tuple(PLAIN_COLUMNS)),
    "txt": (paragraphs, ("sft",)),
}
"""For each format, the function that writes a file of rows and counts them, and the kinds of rows it can hold."""
