"""Shared fixtures of the suite: a quiet offline environment, a tokenizer that is easy to encode by
hand, and real data.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import gc
import json
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Use the same examples in every run; HYPOTHESIS_PROFILE=default draws new examples.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

CACHE = Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf_lightning").expanduser()
"""Cache in which real runs keep converted models; tests use separate caches."""

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
PAD, BOS, EOS, USER, ASSISTANT, END, SYSTEM = range(len(SPECIAL))
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect without garbage collection, and exempt the modules and tests from it: they live to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a CI job (environment variable CI) whose selected tests were all skipped: it has shown nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    counts = reporter.stats if reporter and not hasattr(session.config, "workerinput") else {}
    if os.environ.get("CI") and exitstatus == 0 and counts.get("skipped") and not counts.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def byte_letters() -> dict[int, str]:
    """Return the letter that represents each byte in byte-level vocabularies."""
    letters = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


BC = len(SPECIAL) + 256
"""Id of the only token that covers two bytes."""


def make_tiny_tokenizer(template: str | None = TEMPLATE, adds_bos: bool = False, **changes: Any) -> Any:
    """Build a tokenizer with one token per byte (ids 7 to 262, by value) and ``bc`` (263); ids 0 to 6 are special
    tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [letter for _, letter in sorted(byte_letters().items())]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters, "bc"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    settings = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", **changes}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **settings
    )


def spell(*parts: str | int) -> list[int]:
    """Return ids: texts are encoded byte by byte, special tokens are given as ids."""
    return [index for part in parts for index in ([part] if isinstance(part, int) else [7 + b for b in part.encode()])]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer with a chat template. It is shared, so tests must not change it."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def cheap_libraries() -> Iterator[None]:
    """Read the entry points of the installed packages once, and not for each Trainer; do not wait for the disk, because
    no test sees a power failure.
    """
    from lightning.fabric.utilities import registry

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(registry, "entry_points", functools.cache(registry.entry_points))
        patched.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def no_shared_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear caches that would make a later test measure nothing, and the seed left by an earlier test."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path_factory.getbasetemp() / "caches" / uuid.uuid4().hex))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder for this test only."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RLHF_CACHE", str(folder))
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes rows to a JSONL file and returns its path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> str:
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return a function that finds a file of real data, or skips the test."""
    root = Path(__file__).resolve().parents[1]
    folder = root / os.environ.get("RLHF_DATA", "../shared/data")

    def find(name: str) -> Path:
        file = folder / name
        if not file.is_file():
            pytest.skip(f"the real data {name} is not in {folder}; RLHF_DATA names its folder")
        return file

    return find


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, named in the environment or from an earlier real run; else skip."""
    named = os.environ.get("RLHF_SMOLLM2")
    folders = [Path(named)] if named else sorted((CACHE / "models").glob("SmolLM2-135M-Instruct*"))
    found = [folder for folder in folders if (folder / "tokenizer.json").is_file()]
    if not found:
        pytest.skip("no SmolLM2 folder: `make real-smoke` converts one, or RLHF_SMOLLM2 names it")
    return found[0]


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """Return the tokenizer of SmolLM2-135M-Instruct."""
    from rlhf_lightning.tokenization import load_tokenizer

    return load_tokenizer(smollm2_folder())


@contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    """Assert that an error with this code is raised, and that its message contains the words (names, values)."""
    from rlhf_lightning.errors import RlhfError

    with pytest.raises(RlhfError) as caught:
        yield
    assert caught.value.code == code, f"code {caught.value.code}: {caught.value}"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return a real browser; tests that look at pages skip where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright, which drives it, is not installed")
    places = ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
    found = next((path for path in places if Path(path).exists()), None)
    if found is None:
        pytest.skip("no Chromium to show the page in: install Debian's package chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()
