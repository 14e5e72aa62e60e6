"""Answers of the OpenAI-compatible API: live completions, and their JSON and event-stream formats."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlhf_lightning.commands.completion_requests import Asked, Text
from rlhf_lightning.environments.calls import Call, CallError, calls_in
from rlhf_lightning.sampling.live_batch import LiveCompletion, PromptScores, Token


class Choice(LiveCompletion):
    """A completion of a request; the sampling thread adds tokens to it.

    Args:
        asked: the request.
        text: the tokenizer.
        index: index of the choice.
        seed: seed of the request.
        changed: called after every change, on the sampling thread.
    """

    def __init__(self, asked: Asked, text: Text, index: int, seed: int, changed: Callable[[], None]) -> None:
        assert asked.settings is not None
        prompt = asked.prompts[index // asked.n]
        super().__init__(prompt, asked.settings, seed, index, asked.end_ids, asked.top or 0)
        self.asked, self.tokenizer, self.index, self.changed = asked, text, index, changed
        self.tokens: list[Token] = []
        self.content = ""
        """The text so far, without an incomplete character."""
        self.finish: str | None = None
        self.stop: str | None = None
        """The stop string that ended the completion; None if none did."""
        self.error: Exception | None = None
        self._before = self._read = 0

    @property
    def done(self) -> bool:
        """Whether the completion has ended."""
        return self.finish is not None or self.error is not None

    @property
    def steady(self) -> str:
        """The text that cannot become part of a stop string any more, so it is safe to send."""
        if self.done:
            return self.content
        held = max((len(stop) - 1 for stop in self.asked.stops), default=0)
        return self.content[: len(self.content) - held] if held else self.content

    def calls(self) -> tuple[str, list[Call]]:
        """Return the text without its tool calls, and the calls; a call that cannot be parsed stays text."""
        ids = [token.id for token in self.tokens if token.id not in self.end_ids]
        try:
            before, calls = calls_in(self.tokenizer.decode(ids))  # special tokens mark calls
        except CallError:
            return self.content, []
        return (before, calls) if calls and self.stop is None else (self.content, [])

    def take(self, token: Token) -> bool:
        self.tokens.append(token)
        if not (self.asked.stream or self.asked.stops) or token.id in self.end_ids:
            return False
        self._grow()
        if self.asked.stream:
            self.changed()
        return self.stop is not None

    def end(self, reason: str) -> None:
        if self.stop is None:
            whole = self._decoded([token.id for token in self.tokens])
            if whole.startswith(self.content):
                self._add(whole[len(self.content) :])
        self.finish = "stop" if self.stop is not None else reason
        self.changed()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.changed()

    def _decoded(self, ids: list[int]) -> str:
        if ids and ids[-1] in self.end_ids and self.asked.skip_special:
            ids = ids[:-1]
        if self.asked.to_the_end_token and self.asked.skip_special:
            return self.tokenizer.completion(ids)
        return self.tokenizer.decode(ids, self.asked.skip_special)

    def _grow(self) -> None:
        """Add the text of the new tokens. Earlier tokens are decoded with them, because spaces depend on them."""
        ids = [token.id for token in self.tokens[self._before :]]
        old, new = self._decoded(ids[: self._read - self._before]), self._decoded(ids)
        if len(new) > len(old) and not new.endswith("\ufffd"):
            self._before, self._read = self._read, len(self.tokens)
            self._add(new[len(old) :])

    def _add(self, more: str) -> None:
        start = len(self.content)
        self.content += more
        found = [(place, stop) for stop in self.asked.stops
                 if (place := self.content.find(stop, max(start - len(stop) + 1, 0))) >= 0]  # fmt: skip
        if found:
            place, self.stop = min(found)
            self.content = self.content[:place]


# ---- writing an answer -----------------------------------------------------------------------------------------------


class AnswerWriter:
    """Formats the completions of a request as the OpenAI API does.

    Args:
        asked: the request.
        text: the tokenizer.
        model: name of the model.
    """

    def __init__(self, asked: Asked, text: Text, model: str) -> None:
        self.asked, self.text = asked, text
        self.kind = "chat.completion" if asked.chat else "text_completion"
        prefix = "chatcmpl" if asked.chat else "cmpl"
        self.frame = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[Choice], scores: Sequence[PromptScores]) -> dict[str, Any]:
        """Return the answer to a request without streaming.

        Args:
            choices: the completions; empty if no token was requested.
            scores: the scores of each prompt; empty if none were requested.
        """
        count = len(self.asked.prompts) * self.asked.n
        found = [self._choice(index, choices[index] if choices else None, scores) for index in range(count)]
        return {**self.frame, "object": self.kind, "choices": found, "usage": self.usage(choices)}

    def usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        """Count tokens."""
        prompts = sum(len(prompt) for prompt in self.asked.prompts)
        completions = sum(len(choice.tokens) for choice in choices)
        return {"prompt_tokens": prompts, "completion_tokens": completions, "total_tokens": prompts + completions}

    def _choice(self, index: int, choice: Choice | None, scores: Sequence[PromptScores]) -> dict[str, Any]:
        asked, place = self.asked, index // self.asked.n
        tokens, content = (choice.tokens, choice.content) if choice else ([], "")
        made: dict[str, Any] = {"index": index, "finish_reason": choice.finish if choice else "length"}
        if choice and choice.stop is not None:
            made["stop_reason"] = choice.stop
        if asked.chat:
            made["message"] = self._message(content, choice, made)
            made["logprobs"] = None if asked.top is None else {"content": [self._entry(token) for token in tokens]}
        else:
            before = [None, *scores[place].tokens] if asked.echo and scores else []
            first = int(asked.prompts[place][0])
            made["text"] = (asked.prompt_texts[place] if asked.echo else "") + content
            made["logprobs"] = None if asked.top is None else self._table(first, before, tokens)
        if asked.token_ids:
            made |= {"token_ids": [token.id for token in tokens], "prompt_token_ids": asked.prompts[place].tolist()}
        if asked.prompt_top is not None and scores and not asked.echo:
            made["prompt_logprobs"] = self._prompt_logprobs(scores[place])
        return made

    def _message(self, content: str, choice: Choice | None, made: dict[str, Any]) -> dict[str, Any]:
        """Return the message of a chat; tool calls change its finish reason."""
        calls: list[Call] = []
        if self.asked.tools and choice is not None:
            content, calls = choice.calls()
        if not calls:
            return {"role": "assistant", "content": content}
        if made["finish_reason"] == "stop":
            made["finish_reason"] = "tool_calls"
        written = [
            {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "index": number, "function": {
                "name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
            for number, call in enumerate(calls)
        ]  # fmt: skip
        return {"role": "assistant", "content": content or None, "tool_calls": written}

    def _entry(self, token: Token) -> dict[str, Any]:
        def one(index: int, logprob: float) -> dict[str, Any]:
            name = self.text.name(index, self.asked.tokens_as_ids)
            return {"token": name, "logprob": logprob, "bytes": list(name.encode("utf-8", "replace"))}

        return {**one(token.id, token.logprob), "top_logprobs": [one(*best) for best in token.top]}

    def _table(self, first: int, before: Sequence[Token | None], tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the log-probabilities of a text completion as lists with one element per token."""
        table: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = 0
        for token in [*before, *tokens]:
            name = self.text.name(first if token is None else token.id, self.asked.tokens_as_ids)
            top = None
            if token is not None and self.asked.top:
                top = self._top_table(token)
            values = (name, None if token is None else token.logprob, top, offset)
            for column, value in zip(table.values(), values, strict=True):
                column.append(value)
            offset += len(name)
        return table

    def _top_table(self, token: Token) -> dict[str, float]:
        """Return the most probable tokens by name. If two tokens have the same name, the second is written as an id."""
        found: dict[str, float] = {}
        for index, logprob in (*token.top, *([] if token.id in dict(token.top) else [(token.id, token.logprob)])):
            name = self.text.name(index, self.asked.tokens_as_ids)
            found[f"token_id:{index}" if name in found else name] = logprob
        return found

    def _prompt_logprobs(self, scores: PromptScores) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = [None]
        for token, rank in zip(scores.tokens, scores.ranks, strict=True):
            ranked = [(index, logprob, place) for place, (index, logprob) in enumerate(token.top, 1)]
            entries = [*ranked, (token.id, token.logprob, rank)]
            found.append({
                str(index): {"logprob": logprob, "rank": place, "decoded_token": self.text.name(index)}
                for index, logprob, place in entries
            })  # fmt: skip
        return found

    # ---- streams ----------------------------------------------------------------------------------------------------

    def chunk(self, choices: Iterable[dict[str, Any]], **further: Any) -> str:
        """Return one chunk of a stream as a server-sent event."""
        kind = f"{self.kind}.chunk" if self.asked.chat else self.kind
        return event({**self.frame, "object": kind, "choices": list(choices), **further})

    def opening(self, choices: Sequence[Choice]) -> str:
        """Return the first chunk of a chat stream."""
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self.chunk({"index": choice.index, **start} for choice in choices)

    def piece(self, choice: Choice, finish: str | None, content: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the new part of a completion: text, tokens, and the finish reason."""
        made: dict[str, Any] = {"index": choice.index, "finish_reason": finish, "logprobs": None}
        if self.asked.chat:
            message = self._message(content, choice, made)
            made["delta"] = {name: value for name, value in message.items() if name != "role" and value is not None}
            if self.asked.top is not None:
                made["logprobs"] = {"content": [self._entry(token) for token in tokens]}
        else:
            made["text"] = content
            if self.asked.top is not None:
                made["logprobs"] = self._table(0, [], tokens)
        if self.asked.token_ids:
            made["token_ids"] = [token.id for token in tokens]
        return made


def event(value: Mapping[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(message: str, code: str, status: int, field: str | None = None) -> dict[str, Any]:
    """Return the body of an error response in the API's format."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}
