"""What the libraries say that helps nobody here, each with the reason why it is not shown. The one place for it."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings

SILENCED_MESSAGES = {
    "lightning.pytorch.utilities.rank_zero": (
        "💡 Tip:",  # advertisements for hosted services
        "GPU available:",  # the device is in the manifest; on a CPU three lines say that there is nothing
        "TPU available:",
        "HPU available:",
        "`Trainer.fit` stopped:",  # every run that ends as asked says so
    ),
    "lightning.fabric.utilities.rank_zero": ("GPU available:", "TPU available:"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # kernels that training cannot use
    "lightning.fabric.utilities.seed": ("Seed set to",),  # the seed is in config.yaml and in the manifest
}

SILENCED_WARNINGS = (
    # The loaders read token ids that are in memory: worker processes would only add start-up time.
    r"The '\w+_dataloader' does not have many workers.*",
    # Short runs on small data are common here, and the default logs every step.
    r"The number of training batches \(.*\) is smaller than the logging interval.*",
    # A run without held-out rows has an empty list of loaders, which is what was asked for.
    r"Total length of `list` across ranks is zero.*",
    # A checkpoint folder that is resumed is not empty, by design.
    r"Checkpoint directory .* exists and is not empty.*",
    # Modules leave ragged batches on the CPU by design, whatever DataModule they come from.
    r"You have overridden `transfer_batch_to_device` in `LightningModule`.*",
    # Modules sum numerators and denominators over the ranks themselves, before they log the quotient.
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`.*",
    # Modules log the x-axis (updates) under the name that Lightning reads it from, in training and in evaluation.
    r"You called `self.log\('step', .*",
    # Only some operations have a deterministic form; the default asks for it where it exists.
    r".*does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms.*",
    # What peft asks transformers under a former name.
    r"`is_gradient_checkpointing` is deprecated.*",
    # Internal to Lightning and torch, nothing a user could change.
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`LeafSpec`.*",
)


class _Silence(logging.Filter):
    """Drop messages that contain one of some texts."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.texts)


def quieten_messages() -> None:
    """Silence log messages that ask for nothing; some come while a library is imported, so this comes before."""
    if os.environ.get("RLHF_DEBUG"):
        return
    for name, texts in SILENCED_MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Silence) for present in logger.filters):
            logger.addFilter(_Silence(texts))


def quieten() -> None:
    """Silence adverts and warnings that ask for nothing. RLHF_DEBUG=1 leaves everything as it is."""
    # The tokenizers' thread pool and forked workers exclude each other, and warn about it at length.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RLHF_DEBUG"):
        return
    quieten_messages()
    for message in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _quieten_transformers()
    threading.excepthook = _without_events_writer


def _without_events_writer(failure: threading.ExceptHookArgs) -> None:
    """Say nothing of TensorBoard's writing thread: whoever logs next is handed its exception."""
    trace = failure.exc_traceback
    files = [] if trace is None else [frame.filename for frame in traceback.extract_tb(trace)]
    if not any(file.endswith("event_file_writer.py") for file in files):
        threading.__excepthook__(failure)


def _quieten_transformers() -> None:
    """Drop transformers' notes on loading; a bar per shard of weights belongs on a terminal alone."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        import datasets

        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
