"""Web application of the annotation page: next item, judgement, undo, results."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from rlhf_lightning.commands.web_server import Guard, json_object
from rlhf_lightning.data.feedback.records import (
    LONGEST_SECONDS,
    Answer,
    Assignment,
    Conflict,
    JudgementRefused,
    NotAsked,
    digest,
    encoded,
)  # fmt: skip
from rlhf_lightning.data.feedback.rows import rows_of
from rlhf_lightning.errors import RlhfError, check_range
from rlhf_lightning.people.hostile_text import completion_shown, to_html, turns_of
from rlhf_lightning.people.results import label_rows, results_of, training_command
from rlhf_lightning.people.serving import RESERVED_NAMES, AccessPolicy, is_name
from rlhf_lightning.people.store import FeedbackStore

COOKIE = "annotator"
REASONS = ("correct", "helpful", "clear", "harmless", "honest", "style")
FLAGS = ("broken prompt", "harmful", "personal data", "outside my knowledge")
PAGE = Path(__file__).with_name("page")
MOST_CHOICES = 20
LONGEST_CHOICE = 60
YEAR = 365 * 24 * 3600
Read = TypeVar("Read")


@dataclass(frozen=True)
class PageSettings:
    """Choices and messages of the page."""

    reasons: tuple[str, ...] = REASONS  # reasons for a choice, shown as check boxes
    flags: tuple[str, ...] = FLAGS  # problems of an item, shown as check boxes
    state: Callable[[], str] = lambda: ""  # message for an annotator without an item; empty if nothing more will come
    # function from the number of items left in the store to the number of judgements left
    left: Callable[[int], int] = lambda count: count
    instructions: str = ""  # Markdown instructions, shown at the start and on demand; empty for none

    def __post_init__(self) -> None:
        for choices in (self.reasons, self.flags):
            fits = len(choices) <= MOST_CHOICES and all(0 < len(choice) <= LONGEST_CHOICE for choice in choices)
            rule = f"give at most {MOST_CHOICES} reasons and flags, of 1 to {LONGEST_CHOICE} characters"
            check_range(fits, rule, choices=choices)


def make_app(store: FeedbackStore, access: AccessPolicy | None = None, settings: PageSettings | None = None) -> ASGIApp:
    """Return the web application of a store."""
    access = access or AccessPolicy()
    pages = _Pages(store, access, settings or PageSettings())
    routes = [
        Route("/", pages.annotate),
        Route("/enter", pages.enter),
        Route("/api/enter", pages.say_name, methods=["POST"]),
        Route("/api/item", pages.item),
        Route("/api/judgements", pages.judge, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
        Route("/labels", pages.labels),
        Route("/results", pages.results),
        Route("/results/labels", pages.all_labels),
        Route("/results/labels.jsonl", pages.download),
        Mount("/assets", StaticFiles(directory=PAGE / "assets")),
    ]
    failures = dict.fromkeys((RlhfError, sqlite3.Error), _failure)
    # The guard is outermost, so that responses to failed requests have the security headers too.
    app = Starlette(routes=routes, exception_handlers=failures)
    app.router.redirect_slashes = False
    return Guard(app, any_host=access.tokens is not None)


async def _failure(request: Request, error: Exception) -> Response:
    """Answer with the reason why the store cannot be read or written, and print it for the server's operator."""
    said = str(error) if isinstance(error, RlhfError) else f"the feedback store cannot be read or written ({error})"
    print(f"annotation page: {said}", file=sys.stderr, flush=True)
    return PlainTextResponse(said, 500)


class _Pages:
    """Request handlers. Store access runs in threads, so that requests do not wait for each other's disk access."""

    def __init__(self, store: FeedbackStore, access: AccessPolicy, settings: PageSettings) -> None:
        self.store, self.access, self.settings = store, access, settings
        self.templates = Environment(
            loader=PackageLoader("rlhf_lightning.people", "page"), autoescape=True, undefined=StrictUndefined
        )

    def _who(self, request: Request) -> str | None:
        return self.access.name_of(request.cookies.get(COOKIE))

    def _annotator(self, request: Request) -> str:
        name = self._who(request)
        if name is None:
            raise HTTPException(401, "enter your name first")
        return name

    def _html(self, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(template).render(**values), status)

    # ---- signing in -------------------------------------------------------------------------------------------------

    async def enter(self, request: Request) -> Response:
        """Take a token from a link, or ask for a name."""
        if self.access.tokens is None:
            return self._html("enter.html", asks=True)
        token = request.query_params.get("token")
        if self.access.name_of(token) is None:
            return self._html("enter.html", 401, asks=False)
        response = RedirectResponse("/", 303)
        assert token is not None
        self._set_cookie(request, response, token)
        return response

    async def say_name(self, request: Request) -> Response:
        """Take the name of an annotator on the loopback."""
        name = (await _json_of(request)).get("name")
        if self.access.tokens is not None:
            raise HTTPException(403, "use the link that you were given")
        name = name.strip() if isinstance(name, str) else ""
        if not is_name(name):
            reserved = ", ".join(RESERVED_NAMES)
            raise HTTPException(400, f"a name has 1 to 64 letters, digits and _.@-, and must not be one of {reserved}")
        response = JSONResponse({"name": name})
        self._set_cookie(request, response, name)
        return response

    def _set_cookie(self, request: Request, response: Response, value: str) -> None:
        secure = request.scope["scheme"] == "https"
        response.set_cookie(COOKIE, value, max_age=YEAR, httponly=True, samesite="lax", path="/", secure=secure)

    # ---- labelling --------------------------------------------------------------------------------------------------

    async def annotate(self, request: Request) -> Response:
        """Return the labelling page."""
        name = self._who(request)
        if name is None:
            return RedirectResponse("/enter", 303)
        may = self.access.sees_results(name)
        reasons, flags = self.settings.reasons, self.settings.flags
        text = self.settings.instructions
        shown: dict[str, Any] = {"instructions": Markup(to_html(text)) if text else "", "version": digest(text)}
        return self._html("annotate.html", name=name, sees_results=may, reasons=reasons, flags=flags, **shown)

    async def item(self, request: Request) -> Response:
        """Return the next item."""
        return JSONResponse(await run_in_threadpool(self._next, self._annotator(request)))

    async def judge(self, request: Request) -> Response:
        """Record a judgement; answer with its number and the next item."""
        name, body = self._annotator(request), await _json_of(request)
        try:
            if body.get("store") != self.store.id:
                raise NotAsked("not-asked", "this page shows another store; here is the next item")
            answer = self._answer(body)
            number = await run_in_threadpool(self.store.judge, name, _whole(body, "assignment"), _key(body), answer)
        except (Conflict, NotAsked) as error:
            raise HTTPException(409, str(error)) from error
        except JudgementRefused as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse({"id": number, "next": await run_in_threadpool(self._next, name)})

    async def undo(self, request: Request) -> Response:
        """Undo a judgement, by default the last judgement, and return its item."""
        name, body = self._annotator(request), await _json_of(request)
        try:
            chosen = None if body.get("judgement") is None else _whole(body, "judgement")
            number = await run_in_threadpool(self.store.undo, name, _key(body), chosen)
        except JudgementRefused as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse({"id": number, "next": await run_in_threadpool(self._next, name)})

    def _next(self, name: str) -> dict[str, Any]:
        found = self.store.next(name)
        progress = self.store.progress(name)
        item = None if found is None else {"store": self.store.id, **described(found)}
        return {
            "item": item,
            "progress": progress._replace(left=self.settings.left(progress.left))._asdict(),
            "state": self.settings.state() if item is None else "",
        }

    def _answer(self, body: dict[str, Any]) -> Answer:
        ranks, edited = body.get("ranks"), body.get("edited")
        if edited is not None and not isinstance(edited, str):
            raise JudgementRefused("edit-not-text", "an edited completion must be text")
        if ranks is not None and not (isinstance(ranks, list) and all(type(rank) is int for rank in ranks)):
            raise JudgementRefused("invalid-ranks", "ranks must be whole numbers")
        seconds = body.get("seconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= LONGEST_SECONDS:
            raise JudgementRefused("invalid-seconds", f"seconds must be a number from 0 to {LONGEST_SECONDS:,}")
        return Answer(
            verdict=body.get("verdict"),  # type: ignore[arg-type]  # the store refuses others
            ranks=None if ranks is None else tuple(ranks),
            strength=None if body.get("strength") is None else _whole(body, "strength"),
            reasons=_chosen(body, "reasons", self.settings.reasons),
            flags=_chosen(body, "flags", self.settings.flags),
            edited=edited,
            edited_place=None if body.get("edited_place") is None else _whole(body, "edited_place"),
            seconds=float(seconds),
        )

    # ---- results ----------------------------------------------------------------------------------------------------

    async def results(self, request: Request) -> Response:
        """Return the page with agreement, win rates, annotators and labels over time."""
        name = self._who(request)
        if not self.access.sees_results(name):
            return self._html("enter.html", 403, asks=False)

        def compute(connection: sqlite3.Connection) -> dict[str, Any]:
            found = results_of(connection)
            command, init_from = training_command(connection, self.store.path, found["snapshot"].upto)
            return {**found, "command": command, "init_from": init_from}

        return self._html("results.html", **await self._read(compute))

    async def labels(self, request: Request) -> Response:
        """Return one page of the annotator's own labels; each label can be undone."""
        name = self._who(request)
        return RedirectResponse("/enter", 303) if name is None else await self._labels(request, name)

    async def all_labels(self, request: Request) -> Response:
        """Return one page of all annotators' labels."""
        if not self.access.sees_results(self._who(request)):
            return self._html("enter.html", 403, asks=False)
        return await self._labels(request, None)

    async def _labels(self, request: Request, annotator: str | None) -> Response:
        before = request.query_params.get("before", "")
        last = int(before) if before.isdecimal() and len(before) < 19 else None
        shown = await self._read(lambda connection: label_rows(connection, annotator, last))
        return self._html("labels.html", mine=annotator is not None, **shown)

    async def download(self, request: Request) -> Response:
        """Return every single judgement as JSON Lines."""
        if not self.access.sees_results(self._who(request)):
            return self._html("enter.html", 403, asks=False)
        text = await self._read(lambda stored: "".join(encoded(row) + "\n" for row in rows_of(stored, "judgement")))
        name = {"content-disposition": "attachment; filename=labels.jsonl"}
        return Response(text, headers=name, media_type="application/jsonl")

    async def _read(self, compute: Callable[[sqlite3.Connection], Read]) -> Read:
        def read() -> Read:
            with self.store.reading() as connection:
                return compute(connection)

        return await run_in_threadpool(read)


def described(found: Assignment) -> dict[str, Any]:
    """Describe an item to the page: only its texts, without model, position or repeat, so that labelling is blind."""
    candidates = [found.item.candidates[place] for place in found.shown]
    return {
        "assignment": found.id,
        "prompt": turns_of(found.item.prompt),
        "candidates": [{**completion_shown(one.completion), "raw": one.text} for one in candidates],
    }


async def _json_of(request: Request) -> dict[str, Any]:
    body = await json_object(request)
    try:
        encoded(body).encode()
    except UnicodeError:  # a lone surrogate cannot be stored
        raise HTTPException(400, "the request is not valid Unicode") from None
    return body


def _key(body: dict[str, Any]) -> str:
    key = body.get("key")
    if not isinstance(key, str) or not 16 <= len(key) <= 64 or not key.isascii():
        raise JudgementRefused("invalid-key", "a judgement needs a unique key of 16 to 64 ASCII characters")
    return key


def _whole(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if type(value) is not int or abs(value) >= 2**63:
        raise JudgementRefused("not-a-number", f"{name} must be a whole number")
    return value


def _chosen(body: dict[str, Any], name: str, known: Sequence[str]) -> tuple[str, ...]:
    given = body.get(name, [])
    if not isinstance(given, list) or any(one not in known for one in given):
        raise JudgementRefused("unknown-choice", f"{name} must be a subset of {', '.join(known)}")
    return tuple(one for one in known if one in given)
