"""One-sentence messages for failures: what is wrong and what to do. Imports nothing heavy."""

from __future__ import annotations

import errno

from rlhf_lightning.errors import is_lost_rank, is_out_of_memory

LOWER = (
    "lower data.micro_batch_size, data.max_tokens or data.max_length (on-policy also model.max_new_tokens or "
    "model.sampling_batch_size), or set model.activation_checkpointing=true or model.lora; `rlhf plan` shows the "
    "memory of each part"
)


def failure_sentence(error: Exception) -> str | None:
    """Return one sentence about a failure; None for an unexpected error, whose traceback is needed."""
    name, text = type(error).__name__, str(error).strip()
    first = text.splitlines()[0] if text else name
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if isinstance(error.__context__, OSError):  # the full disk prevented a report of the first error
            return failure_sentence(error.__context__)
        return f"the disk is full ({error}): free some space, and `rlhf fit --resume RUN` continues the run"
    if is_out_of_memory(error):
        return f"out of memory ({first}): {LOWER}"
    if is_lost_rank(error):
        who = "".join(f": {note}" for note in getattr(error, "__notes__", ()))
        return (
            f"another rank does not respond{who} ({first}). Its process, its host or the network failed; "
            "`rlhf fit --resume RUN` continues from the last checkpoint once all ranks are back"
        )
    if type(error).__module__ == "sqlite3":
        return f"the feedback store cannot be read or written ({first}): check the permissions of its file and folder"
    if type(error).__module__.split(".")[0] == "yaml":
        return f"invalid YAML: {' '.join(text.split())}"
    if text.startswith("Does not validate against any of the Union subtypes"):  # a class that refused its arguments
        errors = [line.strip().removeprefix("- ") for line in text.partition("Errors:\n")[2].splitlines()]
        of_parser = ("Not a valid subclass", "Expected a", "Subclass types expect", "a class path", "a dict ")
        return next((line for line in errors if line and not line.startswith(of_parser)), text)
    if text.startswith("No supported gpu backend"):
        return "trainer.accelerator asks for a GPU, and torch finds none: set trainer.accelerator to cpu or auto"
    if text.startswith("Early stopping conditioned on metric"):
        metric, known = text.split("`")[1], text.partition("following: ")[2].replace("`", "")
        return f"EarlyStopping monitors {metric}, which this run does not log: set its monitor to one of {known}"
    # Errors of this package are written for users. Lightning's is checked by name, since it is not imported here.
    own = type(error).__module__.split(".")[0] == __name__.split(".")[0]
    foreseen = own or isinstance(error, ValueError | OSError | ImportError) or name == "MisconfigurationException"
    return text or name if foreseen else None
