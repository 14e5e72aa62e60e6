"""Read a model's folder safely: settings as JSON, weights as safetensors, Python code only if the user named it."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from rlhf_lightning.errors import (
    MissingError,
    ModelError,
    PackageError,
    RlhfError,
    is_lost_rank,
    is_out_of_memory,
)

SAFETENSORS = "*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
"""File types of weights that may run code when they are read."""


def trusts(name: str, trusted: Sequence[str]) -> bool:
    """Return whether a model's own Python files may be run: exactly this name must be listed as trusted."""
    return str(Path(name).expanduser()) in {str(Path(one).expanduser()) for one in trusted}


def require_safetensors(name: str) -> None:
    """Refuse a folder whose only weights are pickles, or whose safetensors hold weights as integers or in 8 bits.

    Names that are not local folders are left to transformers. 8-bit weights are accepted only if config.json states
    their quantization. Otherwise they would be read without their scales.

    Raises:
        ModelError: ``pickled-weights`` or ``integer-weights``.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if any(folder.glob(SAFETENSORS)):
        config = folder / "config.json"
        if not (config.is_file() and read_json(config).get("quantization_config")):
            _refuse_integer_weights(name)
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            "pickled-weights",
            f"the weights in {name} are a pickle ({pickles[0]}), which can run code when it is "
            "read, and there are no safetensors; if you trust it, load and save it once with "
            "transformers (save_pretrained writes safetensors)",
        )


def _refuse_integer_weights(name: str) -> None:
    with reading(name):
        for path in weight_files(Path(name)):
            with safe_open(path, framework="pt") as file:
                kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            for key, kind in kinds.items():
                if key.endswith(".weight") and kind not in ("F64", "F32", "F16", "BF16"):
                    raise ModelError(
                        "integer-weights",
                        f"{path} holds {key} as {kind}, and no config.json states its scale: it would be read "
                        "unscaled; use the original folder, or save the weights dequantized",
                    )


def explained(name: str, error: BaseException) -> str | None:
    """Return what to do if transformers refuses to run a model's own code; None for another error."""
    if "trust_remote_code" not in str(error):
        return None
    return f"{name} needs custom Python code, which runs only if you trust it: --model.trust_remote_code {name}"


# -- checks of a folder's files before a library reads them ------------------------------------------------------------

INDEX = "model.safetensors.index.json"
ATTENTION = ("eager", "sdpa", "flex_attention", "paged|eager")
"""Attention implementations that a model's config may choose; others would be downloaded from a repository."""
KERNELS = ("attn_implementation", "experts_implementation")
NEVER_NEGATIVE = r"(hidden|vocab|intermediate)_size|num_\w*(layers|heads|experts)"
MANY_LAYERS, LARGEST = 4096, 2**31
MANY_NORMALISED = 64
"""Maximum factor by which a tokenizer's normaliser may lengthen a text."""


def check_folder(folder: Path) -> None:
    """Refuse a model's folder whose files cannot be read safely.

    Raises:
        ModelError: ``not-a-file``: a pipe or a device; ``unreadable-model``: damaged JSON, or an index that names files
            other than the folder's safetensors; ``foreign-kernel``; ``model-too-large``; ``model-too-small``;
            ``hostile-tokenizer``.
    """
    for file in folder.iterdir():
        if not file.is_file() and not file.is_dir() and not (file.is_symlink() and not file.exists()):
            raise ModelError(
                "not-a-file", f"{file} is a pipe or a device, not a file; remove it from the model's folder"
            )
    weight_files(folder)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            if name == "config.json":
                _check_config(folder / name, found)
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer(folder / "tokenizer.json")


def read_json(file: Path, text: str | None = None) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelError: ``unreadable-model``: the file holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8") if text is None else text)
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(
            "unreadable-model", f"{file} is not valid JSON ({error}); copy or download the folder again"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            "unreadable-model", f"{file} holds a {type(found).__name__} instead of an object; copy or download it again"
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, in the order in which transformers and peft choose them.

    Raises:
        ModelError: ``unreadable-model``: the index names a file that is not a safetensors file of the folder.
    """
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob(SAFETENSORS))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError("unreadable-model", f"{index} has no weight_map; copy or download the folder again")
    for name in {str(one) for one in names.values()}:
        inside = name == Path(name).name and name.endswith(SAFETENSORS[1:])
        if not inside or not (folder / name).is_file():
            reason = "is missing" if inside else "is not a safetensors file of this folder"
            raise ModelError(
                "unreadable-model", f"{index} names {name!r}, which {reason}; copy or download the folder again"
            )
    return sorted({folder / str(name) for name in names.values()})


def _check_config(file: Path, config: dict[str, Any]) -> None:
    if "transformers_weights" in config:
        raise ModelError("unreadable-model", f"{file} has transformers_weights: remove it, and name the file as usual")
    for key, value in _items(config):
        kernel = next((kind for kind in KERNELS if key.strip("_").startswith(kind)), None)
        wanted = list(value.values()) if isinstance(value, dict) else [value]
        if kernel and any(one is not None and one not in ATTENTION for one in wanted):
            raise ModelError(
                "foreign-kernel",
                f"{file} asks for {key} {value!r}, but a model folder may not choose kernels; remove it, and choose "
                "one with --model.attn_implementation",
            )
        number = isinstance(value, int) and not isinstance(value, bool)
        if number and (value > LARGEST**2 or (value > MANY_LAYERS and re.search(r"layers?$|blocks?$", key))):
            raise ModelError("model-too-large", f"{file} says {key} {value}, which is implausible; correct the file")
        if number and value < 0 and re.fullmatch(NEVER_NEGATIVE, key):
            raise ModelError("model-too-small", f"{file} says {key} {value}, which is implausible; correct the file")
        if number and value > LARGEST and re.search(r"size$|heads$|experts$|_dim$", key):
            raise ModelError("model-too-large", f"{file} says {key} {value}, which is implausible; correct the file")


def _items(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of a config and of its nested configs."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield str(key), value
            yield from _items(value)
    elif isinstance(config, list):
        for value in config:
            yield from _items(value)


def _check_tokenizer(file: Path) -> None:
    """Refuse a tokenizer that makes texts many times longer; a few replacement steps suffice for that."""
    found, longer = read_json(file), 1.0
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        steps = dict(_items({part: found.get(part)}))
        factor = 1.0
        for step in _steps(found.get(part)):
            pattern = step.get("pattern")
            old = pattern.get("String", "x") if isinstance(pattern, dict) else "x"
            new = str(step.get("content") or step.get("prepend") or "")
            factor *= max(1.0, len(new) / max(len(str(old)), 1))
        longer = max(longer, factor if steps else 1.0)
    processor = found.get("post_processor")
    single = [step.get("single") for step in _steps(processor)]
    repeats = max([len(one) for one in single if isinstance(one, list)], default=0)
    if longer > MANY_NORMALISED or repeats > MANY_NORMALISED:
        raise ModelError(
            "hostile-tokenizer",
            f"{file} makes a text up to {max(longer, repeats):,.0f} times longer; use the original tokenizer",
        )


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the steps of a tokenizer component, including the steps of sequences, in order."""
    if isinstance(part, dict):
        yield part
        for key in ("normalizers", "pretokenizers", "decoders", "processors"):
            for step in part.get(key) or []:
                yield from _steps(step)


@contextmanager
def reading(name: str, what: str = "model") -> Iterator[None]:
    """Turn library errors about damaged or unusual model files into one sentence.

    Raises:
        ModelError: ``unreadable-model``.
        MissingError: ``no-model``: the name is not a folder, and the Hub did not provide it.
        PackageError: ``package-needed``.
    """
    try:
        yield
    except (RlhfError, MemoryError, NotImplementedError):
        raise
    except Exception as error:
        full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full_disk or is_out_of_memory(error) or is_lost_rank(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else ""
        if isinstance(error, ImportError):
            raise PackageError("package-needed", f"the {what} {name} cannot be loaded: {reason}") from error
        if isinstance(error, OSError) and not Path(name).exists():
            raise MissingError(
                "no-model", f"the {what} {name} is not here, and the Hub did not provide it: {reason}"
            ) from error
        raise ModelError(
            "unreadable-model",
            f"the {what} {name} cannot be loaded ({type(error).__name__}: {reason}); check that its files "
            "are complete and belong together, or download it again",
        ) from error
