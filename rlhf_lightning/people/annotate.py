"""``rlhf annotate``: label completions in the browser; ``export`` writes labels to a file, ``import`` reads them."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_lightning.atomic_files import complete_file, write_lines
from rlhf_lightning.commands.generate import ONE_TURN, SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import DataError, MissingError, SettingError, check_range

if TYPE_CHECKING:
    from rlhf_lightning.people.candidates import SamplingAhead
    from rlhf_lightning.people.selectors import Selector
    from rlhf_lightning.people.store import FeedbackStore
    from rlhf_lightning.types import Prompt

DEFAULTS = SamplingArguments()

AHEAD, POOL = 16, 256
"""Items sampled ahead without and with --select."""


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf annotate``, ``rlhf annotate export`` or ``rlhf annotate import``."""
    if argv[:1] == ["export"]:
        return run_function(export, argv[1:], "rlhf annotate export")
    if argv[:1] == ["import"]:
        return run_function(import_records, argv[1:], "rlhf annotate import")
    return run_function(annotate, argv, "rlhf annotate", without=ONE_TURN)


def annotate(
    store: str,
    prompts: str | None = None,
    model: Sequence[str] = (),
    pairs: str | None = None,
    candidates: int = 2,
    select: str | None = None,
    ensemble: Sequence[str] = (),
    ahead: int | None = None,
    as_chat: bool = False,
    annotators_per_item: int = 1,
    repeats: float = 0.05,
    reasons: list[str] | None = None,
    flags: list[str] | None = None,
    instructions: str | None = None,
    annotators: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8765,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Serve a page for blind comparison of completions with random sides, and store the judgements.

    Completions are sampled while people work (--prompts with --model; give --model twice to compare two models), or
    come from a file (--pairs). Without either, the items in the store are labelled. `rlhf annotate export` writes the
    labels to a file. `rlhf annotate import` imports labels of Argilla and Label Studio. DataModules also read the store
    directly: --data.source feedback.db.

    Args:
        store: feedback store, such as feedback.db; created if missing.
        prompts: file of prompts, in any format that `rlhf generate` reads.
        model: folder of a policy (full weights or adapter); repeat for further policies.
        pairs: file of preferences in any format that training reads; their labels are not shown.
        candidates: completions of each item; more than two are ranked.
        select: order of the items: random, uncertainty (mean preference of the reward models nearest to 0.5),
            disagreement (variance between reward models), diversity (least similar to the items shown so far), or a
            Selector by import path. null keeps the order in which items were added.
        ensemble: folders of trained reward models: one or more for uncertainty, two or more for disagreement.
        ahead: items sampled ahead of the annotators; by default 16, and 256 with --select.
        as_chat: put a plain-text prompt into a user turn of the chat template.
        annotators_per_item: number of annotators for each item.
        repeats: share of items shown again with sides swapped, to measure consistency.
        reasons: reasons for a choice, shown as check boxes.
        flags: problems of an item, shown as check boxes.
        instructions: Markdown file with instructions, shown to each annotator at the start and on demand.
        annotators: names separated by commas; each gets a link with a token, and no other person may label. Required if
            --host admits other machines.
        host: address to listen on; by default only this machine can connect.
        port: port to listen on; 0 chooses a free port.
        sampling: sampling settings.
    """
    from rlhf_lightning.people.serving import access_policy, print_urls, read_instructions, require_page

    require_page()
    from rlhf_lightning.commands.web_server import listen, make_server
    from rlhf_lightning.data.feedback.database import SUFFIX
    from rlhf_lightning.people.handing_out import Policy
    from rlhf_lightning.people.server import FLAGS, REASONS, PageSettings, make_app
    from rlhf_lightning.people.store import FeedbackStore

    path = Path(store)
    if path.suffix != SUFFIX:
        raise SettingError(
            "wrong-file-ending",
            f"the store {store} does not end in {SUFFIX}, by which training recognizes a store; rename it",
        )
    if (prompts is None) == bool(model):
        raise SettingError("conflicting-settings", "--prompts and --model go together: give both, or neither")
    told = "" if instructions is None else read_instructions(Path(instructions))
    access = access_policy(path, host, annotators)
    selector = selector_of(select, ensemble, sampling.seed)
    given = None
    if pairs is not None:
        from rlhf_lightning.people.candidates import given_items

        given = given_items(pairs)  # read before the store is created, so that a wrong file leaves no store behind
    with ExitStack() as stack:
        listening = stack.enter_context(closing(listen(host, port)))
        opened = stack.enter_context(FeedbackStore(path, Policy(annotators_per_item, repeats, seed=sampling.seed)))
        if pairs is not None and given is not None:
            report_left_out(pairs, [item.columns for item in given])
            print(f"{pairs}: {opened.add(given):,} items are new")
        if selector is not None:
            opened.rank(selector)
        choices = tuple(reasons or REASONS), tuple(flags or FLAGS)
        page = PageSettings(*choices, instructions=told)
        if prompts is not None:
            ahead = ahead or (AHEAD if selector is None else POOL)
            source = sampling_ahead(opened, prompts, model, candidates, sampling, ahead, as_chat, selector)
            sampler = stack.enter_context(source)
            page = PageSettings(*choices, sampler.state, sampler.left, told)
        app = make_app(opened, access, page)
        print_urls(listening, host, access)
        make_server(app).run(sockets=[listening])
    return 0


def sampling_ahead(
    store: "FeedbackStore", prompts: str, models: Sequence[str], candidates: int, sampling: SamplingArguments,
    ahead: int, as_chat: bool, selector: "Selector | None",
) -> "SamplingAhead":  # fmt: skip
    """Load the models and return the sampler of the page's items."""
    from rlhf_lightning.commands.generate import read_prompts
    from rlhf_lightning.data.feedback.records import MOST_CANDIDATES
    from rlhf_lightning.people.candidates import SamplingAhead, Stop, load_policies, sampled_items

    rule = f"give 2 to {MOST_CANDIDATES}, at least one for each of {len(models)} models"
    check_range(max(2, len(models)) <= candidates <= MOST_CANDIDATES, rule, candidates=candidates)
    rows = read_prompts(prompts, as_chat)
    policies, settings = load_policies(models, sampling), sampling.settings()
    at_once = max(min(ahead, sampling.batch_size), 1)
    report_left_out(prompts, [columns for _, columns in rows])
    unsampled = sum(not store.has_prompt(prompt) for prompt, _ in rows)

    def skip(prompt: "Prompt") -> bool:
        nonlocal unsampled
        known = store.has_prompt(prompt)
        unsampled -= not known
        return known

    stop = Stop()
    batches = sampled_items(policies, rows, candidates, settings, sampling.seed, at_once, skip, on_pass=stop)
    return SamplingAhead(store, batches, ahead, selector, lambda: unsampled, stop)


def report_left_out(path: str, columns: "Sequence[dict[str, Any]]") -> None:
    """Print which columns of a file will not be available when training on the store."""
    from rlhf_lightning.data.feedback.rows import TAKEN_COLUMNS

    taken = sorted({name for row in columns for name in row} & TAKEN_COLUMNS)
    if taken:
        print(f"{path}: training on the store leaves out {', '.join(taken)}: these names are reserved for labels")


def selector_of(select: str | None, ensemble: Sequence[str], seed: int) -> "Selector | None":
    """Return the selector of --select; None without it."""
    if select is None:
        if ensemble:
            raise SettingError(
                "conflicting-settings",
                "--ensemble serves --select uncertainty or disagreement: give one of them, or leave --ensemble out",
            )
        return None
    from rlhf_lightning.people.selectors import load_selector

    return load_selector(select, ensemble, seed)


def export(
    store: str,
    out: str,
    kind: Literal[
        "preference", "unpaired", "demonstration", "prompt", "judgement", "argilla", "label-studio"
    ] = "preference",
    labels: Literal["mean", "reliability"] = "mean",
    annotators: str | None = None,
    snapshot: int | None = None,
) -> int:
    """Write the labels of a store to a file that training reads.

    Args:
        store: feedback store; labelling may continue at the same time.
        out: file to write, .jsonl or .parquet; .json for argilla and label-studio.
        kind: preference (pairs with soft labels and margins, or ranked lists), unpaired (each completion good or bad),
            demonstration (rewritten completions), prompt, judgement (every single judgement), argilla or label-studio
            (all items with their judgements, as records of these tools).
        labels: how several judgements of one pair are combined: their mean, or weighted by estimated reliability.
        annotators: names of the annotators whose judgements are used, separated by commas; by default all.
        snapshot: number of the last row of judgements to use; by default the newest.
    """
    from rlhf_lightning.data.feedback.bridges import records_of
    from rlhf_lightning.data.feedback.database import reading, snapshot_of
    from rlhf_lightning.data.feedback.rows import rows_of

    target, foreign = Path(out), kind in ("argilla", "label-studio")
    endings = (".json",) if foreign else (".jsonl", ".parquet")
    if target.suffix not in endings:
        raise SettingError("wrong-file-ending", f"{out} does not end in {' or '.join(endings)}: give it such an ending")
    with reading(Path(store)) as connection:
        taken = snapshot_of(connection, snapshot)
        names = None if annotators is None else [name.strip() for name in annotators.split(",")]
        if kind == "argilla" or kind == "label-studio":
            rows = records_of(connection, kind, taken.upto, names)
        else:
            rows = list(rows_of(connection, kind, taken.upto, labels, names))
    if not rows:
        raise DataError(
            "no-usable-rows",
            f"{store} has no labels of kind {kind} up to row {taken.upto}: collect such labels, or name another --kind",
        )
    if foreign:
        write_lines(target, [rows])
    elif target.suffix == ".jsonl":
        write_lines(target, rows)
    else:
        write_parquet(target, rows)
    print(f"{out}: {len(rows):,} rows of snapshot {taken.upto}, fingerprint {taken.fingerprint}")
    return 0


def import_records(
    store: str,
    records: str,
    tool: Literal["argilla", "label-studio"],
    prompt_field: str | None = None,
    completion_fields: list[str] | None = None,
) -> int:
    """Import items and judgements of Argilla or Label Studio; a second import adds only new items and judgements.

    Args:
        store: feedback store, such as feedback.db; created if missing.
        records: JSON file written by Argilla's `dataset.records.to_json`, or by Label Studio's export.
        tool: argilla or label-studio.
        prompt_field: field of the prompt; by default prompt, instruction, question or a similar name.
        completion_fields: fields of the completions; by default numbered fields such as response-1 and response-2.
    """
    from rlhf_lightning.people.serving import require_page

    require_page()
    from rlhf_lightning.data.feedback.bridges import read_record
    from rlhf_lightning.people.store import FeedbackStore

    if Path(store).suffix != ".db":
        raise SettingError("wrong-file-ending", f"the store {store} does not end in .db: rename it")
    if Path(records).exists() and not Path(records).is_file():
        raise DataError("not-a-record", f"{records} is a folder, a pipe or a device: name a JSON file")
    try:
        found = json.loads(Path(records).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError("no-file", f"there is no file {records}") from None
    except (ValueError, RecursionError):
        raise DataError("not-a-record", f"{records} is not a JSON file: export the records of {tool} as JSON") from None
    imported, refused = [], Counter[str]()
    for record in found if isinstance(found, list) else [found]:
        try:
            imported.append(read_record(record, tool, prompt_field, completion_fields or ()))
        except DataError as error:
            refused[str(error)] += 1
    said = "; ".join(f"{count} records: {reason}" for reason, count in refused.items())
    if not imported:
        raise DataError("no-usable-rows", f"{records} has no record that can be read ({said or 'it is empty'})")
    with FeedbackStore(Path(store)) as opened:
        new = sum(opened.take_over(*one) for one in imported)
    judged = sum(len(one.answers) for one in imported)
    print(
        f"{store}: {len(imported):,} items, {new:,} of {judged:,} judgements are new"
        + (f"; left out {said}" if said else "")
    )
    return 0


def write_parquet(target: Path, rows: list[dict[str, Any]]) -> None:
    """Write a Parquet file atomically: it is renamed to its final name when complete."""
    import pyarrow
    import pyarrow.parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except pyarrow.ArrowException as error:
        raise DataError("not-tabular", f"these rows do not fit one table ({error}): write .jsonl instead") from error
    with complete_file(target) as partial:
        pyarrow.parquet.write_table(table, partial)
