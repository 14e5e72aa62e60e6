"""``rlhf annotate``: people compare completions in the browser; ``rlhf annotate export``: their labels as a file."""

# No postponed annotations: to resolve them jsonargparse imports what is under TYPE_CHECKING, and help takes seconds.

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_lightning.commands.generate import SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, SettingError

if TYPE_CHECKING:
    from rlhf_lightning.people.selectors import Selector
    from rlhf_lightning.people.store import FeedbackStore

DEFAULTS = SamplingArguments()

AHEAD, POOL = 16, 256
"""Items sampled ahead where nothing chooses among them, and where something does."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf annotate``, or ``rlhf annotate export``."""
    if argv[:1] == ["export"]:
        return run_function(export, argv[1:], "rlhf annotate export")
    return run_function(annotate, gathered(gathered(argv, "--model"), "--ensemble"), "rlhf annotate")


def gathered(argv: Sequence[str], option: str) -> list[str]:
    """The command line with an option that has several values, or is given several times, written as one list."""
    values, rest, empty, following = [], [], False, False
    for argument in argv:
        if argument == option:
            empty, following = True, True
        elif argument.startswith(f"{option}="):
            values.append(argument.partition("=")[2])
            following = False
        elif following and not argument.startswith("--"):
            values.append(argument)
            empty = False
        elif empty:
            break
        else:
            rest.append(argument)
            following = False
    if empty:
        return list(argv)  # one has no value, which the parser says
    return [*rest, option, json.dumps(values)] if values else rest


def annotate(
    store: str,
    prompts: str | None = None,
    model: list[str] | None = None,
    pairs: str | None = None,
    candidates: int = 2,
    select: str | None = None,
    ensemble: list[str] | None = None,
    ahead: int | None = None,
    as_chat: bool = False,
    annotators_per_item: int = 1,
    repeats: float = 0.05,
    reasons: list[str] | None = None,
    flags: list[str] | None = None,
    annotators: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Serve a page on which people compare completions, blind and with sides at random, and keep what they say.

    Completions are sampled while people work (--prompts with --model, given twice to compare two models), or are given
    (--pairs). Without either, labelling goes on with what the store holds. `rlhf annotate export` writes the labels to
    a file; every DataModule also takes the store itself: --data.source feedback.db.

    Args:
        store: file of the labels, such as feedback.db; made if there is none.
        prompts: file of prompts, in any form that `rlhf generate` reads.
        model: folder of a policy, whole or adapter; once more for each further one.
        pairs: file of preferences in any form that training reads; their labels are not shown.
        candidates: completions of each item; more than two are ranked.
        select: which item is shown next: random; uncertainty (the reward models' mean preference is nearest to a
            coin's), disagreement (it varies most between them), diversity (the least like what was shown), or the
            import path of a Selector of your own. By default they are shown as they come.
        ensemble: folders of reward models trained on labels made before: one or more for uncertainty, two or more for
            disagreement.
        ahead: items that are sampled ahead of the annotators, and from which --select chooses; 16 where it is not
            given, and 256 with --select.
        as_chat: put a plain-text prompt into a user turn of the chat template.
        annotators_per_item: how many people judge each item.
        repeats: share of items shown again with sides swapped, to measure consistency.
        reasons: what may have decided, to be ticked.
        flags: what may be wrong with an item, to be ticked.
        annotators: names, with commas between; each gets a link with a token of its own, and nobody else comes in.
            Needed where --host is not this machine alone.
        host: address to listen on; the default is reached from this machine alone.
        port: port to listen on; 0 takes a free one.
        sampling: how completions are sampled.
    """
    from rlhf_lightning.people.labeller import require_web_server

    require_web_server()
    from rlhf_lightning.data.feedback.snapshots import SUFFIX
    from rlhf_lightning.people.handing_out import Policy
    from rlhf_lightning.people.server import FLAGS, REASONS, PageSettings, make_app
    from rlhf_lightning.people.serving import door_of, listen, make_server, say_where
    from rlhf_lightning.people.store import FeedbackStore

    path = Path(store)
    if path.suffix != SUFFIX:
        raise SettingError(
            "wrong-file-ending",
            f"the store {store} does not end in {SUFFIX}: training knows a store by it, so name one that does",
        )
    if (prompts is None) != (model is None):
        raise SettingError("conflicting-settings", "--prompts and --model go together: give both, or neither")
    door = door_of(path, host, annotators)
    selector = selector_of(select, ensemble, sampling.seed)
    given = None
    if pairs is not None:
        from rlhf_lightning.people.candidates import given_items

        given = list(given_items(pairs))  # before a store is made for them
    with ExitStack() as stack:
        listening = stack.enter_context(closing(listen(host, port)))
        opened = stack.enter_context(FeedbackStore(path, Policy(annotators_per_item, repeats, seed=sampling.seed)))
        if given is not None:
            print(f"{pairs}: {opened.add(given):,} items are new")
        if selector is not None:
            opened.rank(selector)
        state: Callable[[], str] = str
        if prompts is not None and model is not None:
            state = stack.enter_context(
                sampling_ahead(
                    opened,
                    prompts,
                    model,
                    candidates,
                    sampling,
                    ahead or (AHEAD if selector is None else POOL),
                    as_chat,
                    selector,
                )
            ).state
        page = PageSettings(tuple(reasons or REASONS), tuple(flags or FLAGS), state)
        app = make_app(opened, door, page)
        say_where(listening, host, door)
        make_server(app).run(sockets=[listening])
    return 0


def sampling_ahead(
    store: "FeedbackStore", prompts: str, models: list[str], candidates: int, sampling: SamplingArguments, ahead: int,
    as_chat: bool, selector: "Selector | None",
) -> Any:  # fmt: skip
    """Load the models, and return what samples from them in a thread.

    Raises:
        ValueError: there are fewer completions than models, or a model or the prompts cannot be used.
    """
    from rlhf_lightning.commands.generate import read_prompts
    from rlhf_lightning.commands.quiet import quieten
    from rlhf_lightning.data.feedback.records import MOST_CANDIDATES
    from rlhf_lightning.people.candidates import SamplingAhead, load_policies, sampled_items

    if not max(2, len(models)) <= candidates <= MOST_CANDIDATES:
        raise SettingError(
            "setting-out-of-range",
            f"candidates is {candidates}: give 2 to {MOST_CANDIDATES}, one or more for each of {len(models)} models",
        )
    quieten()
    rows = read_prompts(prompts, as_chat)
    policies, settings = load_policies(models, sampling), sampling.settings()
    at_once = max(min(ahead, sampling.batch_size), 1)
    batches = sampled_items(policies, rows, candidates, settings, sampling.seed, at_once, store.has_prompt)
    return SamplingAhead(store, batches, ahead, selector)


def selector_of(select: str | None, ensemble: list[str] | None, seed: int) -> "Selector | None":
    """What --select names; None without it.

    Raises:
        SettingError: it names no selector, it lacks reward models, or they are given to none.
    """
    if select is None:
        if ensemble:
            raise SettingError(
                "conflicting-settings",
                "--ensemble serves --select uncertainty or disagreement: give one of them",
            )
        return None
    from rlhf_lightning.people.selectors import load_selector

    return load_selector(select, ensemble or [], seed)


def export(
    store: str,
    out: str,
    kind: Literal["preference", "unpaired", "demonstration", "prompt", "judgement"] = "preference",
    labels: Literal["mean", "reliability"] = "mean",
    annotators: str | None = None,
    snapshot: int | None = None,
) -> int:
    """Write the labels of a store to a file that training reads.

    Args:
        store: the store; people may go on labelling.
        out: file to write, .jsonl or .parquet.
        kind: preference (pairs with soft labels and margins, or ranked lists), unpaired (each completion good or bad),
            demonstration (what annotators rewrote), prompt, or judgement (each as it was made).
        labels: how several judgements of one pair become a label: their mean, or by the annotators' estimated
            reliability.
        annotators: names, with commas between, of those whose judgements count; by default everybody's.
        snapshot: number of the last row of judgements; by default all there are.
    """
    from rlhf_lightning.commands.generate import write_lines
    from rlhf_lightning.data.feedback.rows import rows_of
    from rlhf_lightning.data.feedback.snapshots import reading, snapshot_of

    target = Path(out)
    if target.suffix not in (".jsonl", ".parquet"):
        raise SettingError(
            "wrong-file-ending",
            f"{out} ends in neither .jsonl nor .parquet: give it one of these endings",
        )
    with reading(Path(store)) as connection:
        taken = snapshot_of(connection, snapshot)
        names = None if annotators is None else [name.strip() for name in annotators.split(",")]
        rows = list(rows_of(connection, kind, taken.upto, labels, names))
    if not rows:
        raise DataError(
            "no-usable-rows",
            f"{store} holds nothing of kind {kind} up to row {taken.upto}: collect such labels, or name another --kind",
        )
    if target.suffix == ".jsonl":
        write_lines(target, rows)
    else:
        write_parquet(target, rows)
    print(f"{out}: {len(rows):,} rows of snapshot {taken.upto}, fingerprint {taken.fingerprint}")
    return 0


def write_parquet(target: Path, rows: list[dict[str, Any]]) -> None:
    """Write a Parquet file; it appears when all is done.

    Raises:
        DataError: a column holds text in one row and messages in another, which a table cannot.
    """
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except pyarrow.ArrowException as error:
        raise DataError("not-tabular", f"these rows do not fit one table ({error}): write .jsonl instead") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        pyarrow.parquet.write_table(table, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
