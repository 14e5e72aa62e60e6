"""Silence messages and warnings of libraries, each with the reason."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence

NOISE = ("💡 Tip:", "GPU available:", "TPU available:", "HPU available:")
"""Advertisements for hosted services, and device messages: the manifest records the device."""

SILENCED_MESSAGES = {
    "lightning.pytorch.utilities.rank_zero": NOISE,
    "lightning.fabric.utilities.rank_zero": NOISE,
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # kernels that training cannot use
}

MESSAGES_OF_COMMANDS = {
    "lightning.pytorch.utilities.rank_zero": ("`Trainer.fit` stopped:",),  # printed at the normal end of every run
    "lightning.fabric.utilities.seed": ("Seed set to",),  # the seed is in config.yaml and in the manifest
}
"""Messages that are useful in a script and redundant in a command."""

SILENCED_WARNINGS = (
    # The loaders read token ids from memory: worker processes would only add start-up time.
    r"The '\w+_dataloader' does not have many workers.*",
    # Short runs on small data are common here, and the default logs every step.
    r"The number of training batches \(.*\) is smaller than the logging interval.*",
    # A run without held-out rows has an empty list of loaders.
    r"Total length of `list` across ranks is zero.*",
    # On resume the checkpoint folder is not empty.
    r"Checkpoint directory .* exists and is not empty.*",
    # Modules reduce numerators and denominators over ranks themselves before they log the quotient.
    r"It is recommended to use `self\.log\(.*sync_dist=True\)`.*",
    # Modules log the x-axis (updates) as `step`, which Lightning reads.
    r"You called `self.log\('step', .*",
    # The default `deterministic: warn` uses deterministic kernels where they exist.
    r".*does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms.*",
    # peft uses a deprecated name of transformers.
    r"`is_gradient_checkpointing` is deprecated.*",
)


class _Silence(logging.Filter):
    """Drop messages that contain one of ``texts``."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not any(text in message for text in self.texts)


def silence_log_messages(messages: Mapping[str, Sequence[str]] = SILENCED_MESSAGES) -> None:
    """Silence log messages. Call it before the libraries are imported: some log during import."""
    if os.environ.get("RLHF_DEBUG"):
        return
    for name, texts in messages.items():
        logger = logging.getLogger(name)
        found = next((present for present in logger.filters if isinstance(present, _Silence)), _Silence())
        found.texts.update(texts)
        logger.addFilter(found)  # adding the same filter again has no effect


def silence_libraries() -> None:
    """Silence log messages and warnings of libraries. RLHF_DEBUG=1 keeps all of them."""
    # The tokenizers' thread pool does not work in forked workers, and logs a warning about it.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("RLHF_DEBUG"):
        return
    silence_log_messages()
    silence_log_messages(MESSAGES_OF_COMMANDS)
    for message in SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    _silence_transformers()
    threading.excepthook = _ignore_event_writer


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence warnings, and messages about models that are drawn or loaded: verification makes hundreds of them."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch.utilities.rank_zero", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _ignore_event_writer(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writer thread: the next logging call raises its exception."""
    trace = failure.exc_traceback
    files = [] if trace is None else [frame.filename for frame in traceback.extract_tb(trace)]
    if not any(file.endswith("event_file_writer.py") for file in files):
        threading.__excepthook__(failure)


def _silence_transformers() -> None:
    """Silence transformers' loading messages; show progress bars only on a terminal.

    Libraries that are not imported yet are configured through environment variables, so that commands stay fast.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    bars = sys.stderr.isatty()
    if not bars:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        if not bars:
            transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules and not bars:
        sys.modules["datasets"].disable_progress_bars()
