"""``rlhf critique``: answer prompts, criticise and revise the answers by a constitution, keep the revisions."""

# No postponed annotations: to resolve them, jsonargparse would import everything under TYPE_CHECKING (slow help).

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_lightning.atomic_files import write_lines
from rlhf_lightning.commands.generate import ONE_TURN, SamplingArguments
from rlhf_lightning.commands.parsing import run_function
from rlhf_lightning.errors import SettingError, check_range

if TYPE_CHECKING:
    from rlhf_lightning.constitution.revision import Chain
    from rlhf_lightning.scoring.judges.judge import Writer

DEFAULTS = SamplingArguments()


def main(argv: Sequence[str]) -> int:
    """Run ``rlhf critique``."""
    return run_function(critique, argv, "rlhf critique", without=ONE_TURN)


def critique(
    model: str,
    prompts: str,
    out: str,
    constitution: str = "harmless",
    rounds: int = 4,
    mix: Literal["last", "all"] = "all",
    without_critique: bool = False,
    keep_unfinished: bool = False,
    server_model: str | None = None,
    api_key: str | None = None,
    as_chat: bool = False,
    sampling: SamplingArguments = DEFAULTS,
) -> int:
    """Turn prompts into demonstrations: sample answers, then criticise and revise them in several rounds.

    This is the supervised stage of Constitutional AI (arXiv 2212.08073). Each row has prompt and completion, which
    SFTDataModule reads, and principle, round, parent (the answer before the revision), critique, model and constitution
    (its fingerprint). A revision is dropped and counted if it is empty, unchanged or unfinished, if it talks about
    itself, or if the critique was a refusal. Counts are printed and written to OUT.report.json. The same seed gives the
    same rows; the same command resumes a killed run.

    Args:
        model: folder of a policy, .gguf file, hub id, or address of an OpenAI-compatible server (http://host:8000).
        prompts: file of prompts (.jsonl, .json, .csv, .parquet): a column prompt or messages, or any training format.
        out: JSONL file of demonstrations; written when the run is complete.
        constitution: name of a shipped constitution (harmless, helpful), or a YAML file.
        rounds: number of revisions of each answer, each by another principle.
        mix: rows to keep for each prompt: the last revision, or all.
        without_critique: ask for a revision without a critique.
        keep_unfinished: also keep revisions that reached the maximum length.
        server_model: name of the model on the server.
        api_key: name of the environment variable with the server's key.
        as_chat: put a plain-text prompt into a user turn of the chat template.
        sampling: sampling settings of answers, critiques and revisions.
    """
    from rlhf_lightning.commands.generate import CHUNKS_AT_ONCE, read_prompts
    from rlhf_lightning.commands.journal import Journal, model_stamp
    from rlhf_lightning.constitution.principles import load_constitution
    from rlhf_lightning.constitution.revision import RevisionSettings, demonstrations, revise, revision_report
    from rlhf_lightning.data.feedback.records import digest
    from rlhf_lightning.evaluation.report import write_json

    rules, target = load_constitution(constitution), Path(out)
    rules.require("revising")
    settings = RevisionSettings(rounds, not without_critique, keep_unfinished, sampling.seed)
    drawn = sampling.provenance()
    rows = [prompt for prompt, _ in read_prompts(prompts, as_chat)]
    provenance = {
        "model": server_model or model,
        "constitution": rules.fingerprint,
        "constitution_name": f"{rules.name} v{rules.version}",
        "sampling": drawn,
        **asdict(settings),
    }
    task = {**provenance, "model": model_stamp(model), "dtype": sampling.dtype, "prompts": digest(rows)}
    template = {"chat_template": sampling.chat_template, "template_args": sampling.template_args}
    journal = Journal(target, {**task, **template})
    writer = _writer(model, server_model, api_key, sampling)
    at_once = sampling.batch_size * CHUNKS_AT_ONCE
    if journal.done:
        print(f"{journal.path}: resuming after {journal.done:,} of {len(rows):,} prompts")
    for start in range(journal.done, len(rows), at_once):
        chains = revise(writer, rules, rows[start : start + at_once], settings, start)
        journal.add(start + len(chains), [asdict(chain) for chain in chains])
        print(f"{journal.done:,} of {len(rows):,} prompts", flush=True)
    chains = [_chain(record) for record in journal.records]
    origin = {"model": provenance["model"], "constitution": rules.fingerprint}
    found = [{**row, **origin} for chain in chains for row in demonstrations(chain, mix)]
    report = {**provenance, "mix": mix, "rows": len(found), **revision_report(chains)}
    write_json(report_file(target), report)
    write_lines(target, found)
    journal.finish()
    print(f"{out}: {len(found):,} rows by {rules.title}\n{describe(report)}")
    return 0


def report_file(target: Path) -> Path:
    """Return the path of the report that belongs to a file of rows."""
    return target.with_suffix(".report.json")


def _writer(model: str, server_model: str | None, api_key: str | None, sampling: SamplingArguments) -> "Writer":
    """Return the writer of answers, critiques and revisions.

    Raises:
        SettingError: settings of a server and of a local model are mixed, or max_new_tokens fills the context.
    """
    if not model.startswith(("http://", "https://")):
        if server_model is not None or api_key is not None:
            raise SettingError(
                "conflicting-settings",
                "server_model and api_key apply only to a server: give its address as model, http://host:8000",
            )
        from rlhf_lightning.scoring.judges import LocalWriter

        policy, tokenizer = sampling.load(model)
        writer = LocalWriter(policy, tokenizer, sampling.settings(), sampling.seed, model, sampling.make_engine())
        check_range(
            writer.longest is None or sampling.max_new_tokens < writer.longest,
            f"lower it; the context of {model} is {writer.longest} tokens, including the prompt, which leaves no room",
            max_new_tokens=sampling.max_new_tokens,
        )
        return writer
    if server_model is None:
        raise SettingError("missing-setting", "a server needs server_model: give the name of the model on it")
    for name in ("engine", "chat_template", "template_args"):
        if getattr(sampling, name) is not None:
            raise SettingError(
                "conflicting-settings", f"{name} applies only to a local model; {model} is a server: leave it out"
            )
    if sampling.top_k:
        raise SettingError("conflicting-settings", f"top_k is {sampling.top_k}: a server supports only top_p")
    from rlhf_lightning.scoring.judges import RemoteWriter
    from rlhf_lightning.scoring.judges.remote import ChatServer

    server = ChatServer(model, server_model, requests=sampling.batch_size, api_key=api_key)
    return RemoteWriter(server, sampling.settings(), sampling.seed)


def _chain(record: dict[str, Any]) -> "Chain":
    from rlhf_lightning.constitution.revision import Chain, Round

    return Chain(record["prompt"], record["answer"], tuple(Round(**one) for one in record["rounds"]))


def revisions_table(report: dict[str, Any]) -> str:
    """Return the table of kept and dropped revisions by round."""
    from rlhf_lightning.constitution.revision import REASONS
    from rlhf_lightning.evaluation.report import markdown_table

    found = [reason for reason in REASONS if any(one["refused"].get(reason) for one in report["rounds"])]
    rows = [
        [one["round"], one["revisions"], one["kept"], *(one["refused"].get(reason, 0) for reason in found),
         one["length_ratio"]]
        for one in report["rounds"]
    ]  # fmt: skip
    return markdown_table(["round", "revisions", "kept", *found, "length ratio"], rows)


def describe(report: dict[str, Any]) -> str:
    """Return the table of revisions and a sentence about the prompts."""
    said = f"{report['revised_prompts']:,} of {report['prompts']:,} prompts have a revision"
    if report["no_answer"]:
        said += f"; {report['no_answer']:,} have no first answer, because it is empty or does not fit into the context"
    return f"{revisions_table(report)}\n{said}"
