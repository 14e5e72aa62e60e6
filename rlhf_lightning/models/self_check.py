"""Check a model against itself: compare our forward with its class's own ``forward(...).logits``.

`check_class` compares them when the model is loaded, on a small copy of the model (see `models.small_copy`). The copy's
windows, chunks and softcaps are so small that short sequences reach them. The result is cached by class, config and
versions. `check_weights` compares them on the real weights, on their device and in their precision. If a path
disagrees, the next one is used and the reason is printed: packed rows -> one row per sequence; the LM head's weight ->
the model's own head -> its own forward. If no path agrees, the model is refused.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from rlhf_lightning.atomic_files import write_text
from rlhf_lightning.compat import attention_kernel
from rlhf_lightning.errors import ModelError, SettingError, reason_of
from rlhf_lightning.functional.logprobs import at_least_float32, token_logprobs
from rlhf_lightning.loading import cache_folder
from rlhf_lightning.models.causal_lm import CausalLM, LogitsPath, OwnLogits, inference_mode_of
from rlhf_lightning.models.layout import Layout, packed_layout, padded_layout, select
from rlhf_lightning.models.loading import prepare_for_training
from rlhf_lightning.models.lora import LoraSettings, add_lora
from rlhf_lightning.models.packing import trees_of
from rlhf_lightning.models.scalar_head import ScalarModel, reads_trees, unwrapped, vocabulary_rows
from rlhf_lightning.models.sharding import is_sharded
from rlhf_lightning.models.small_copy import VOCABULARY, small_copy
from rlhf_lightning.types import Sequences

CLOSE = 1e-4
"""Maximum difference of log-probabilities on the small copy, in fp32, nats."""
CLOSE_BY_DTYPE: dict[torch.dtype, float] = {torch.float32: 1e-2, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Maximum mean difference over tokens on the real weights, nats: a wrong forward changes the mean by whole nats."""


class Findings(NamedTuple):
    """How to forward a class of models.

    Attributes:
        reads_trees: whether packed rows agree with the model's own forward.
        pads_rows: whether padded rows of different lengths agree with it.
        logits_path: how logits are computed, see `models.causal_lm.LogitsPath`.
        lines: messages for the user.
        refusal: error code and sentence if no path agrees.
    """

    reads_trees: bool
    pads_rows: bool
    logits_path: LogitsPath
    lines: Sequence[str] = ()
    refusal: Sequence[str] | None = None


# -- the small copy ---------------------------------------------------------------------------------------------------


def check_class(model: CausalLM | ScalarModel, lora: LoraSettings | None = None) -> None:
    """Check a small copy of a model's class and config, and configure the model to be forwarded on paths that agree.

    Args:
        model: the loaded model.
        lora: the adapter to be trained; its gradients are checked too.

    Raises:
        ModelError: no path agrees with the model's own forward, or the model attends to later tokens.
    """
    key = check_key(model.model, "forward", [] if lora is None else asdict(lora))
    scores = isinstance(model, ScalarModel)
    found = found_once(key, lambda: examine(unwrapped(model.model), scores, lora), lambda values: Findings(*values))
    for line in found.lines:
        rank_zero_info(line)
    if found.refusal is not None:
        raise ModelError(*found.refusal)
    model.reads_trees = model.reads_trees and found.reads_trees
    model.pads_rows = found.pads_rows
    if isinstance(model, CausalLM):
        model.self_check = True
        if model.logits_path == "product":
            model.logits_path = found.logits_path


_found: dict[str, Any] = {}
T = TypeVar("T")


def found_once(key: str, examine: Callable[[], T], read: Callable[[list[Any]], T]) -> T:
    """Return the result of a check by its `check_key`: from this process, else from the cache, else by checking."""
    if key not in _found:
        file = cache_folder() / "self_check" / f"{key}.json"
        try:
            _found[key] = read(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, LookupError):
            _found[key] = examine()
            _write(file, _found[key])
    found: T = _found[key]
    return found


def check_key(model: Any, *further: Any) -> str:
    """Hash everything that a check's result depends on: the model's class and config, this package, its libraries."""
    inner = unwrapped(model)
    config = inner.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id"):
        config.pop(name, None)
    files: list[str | Path] = [inspect.getfile(type(inner)), *sorted(Path(__file__).parent.glob("*.py"))]
    code = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    versions = [torch.__version__, transformers.__version__, code]
    kernel = attention_kernel(inner.config)
    parts = [type(inner).__qualname__, config, kernel, versions, further]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _write(file: Path, found: Any) -> None:
    """Write a result to the cache; a failed write only costs time."""
    with suppress(OSError, SettingError):
        write_text(file, json.dumps(found))


def working_copy(model: Any, trees: bool = False) -> tuple[Any, Findings | None]:
    """Return a small copy whose own forward works; otherwise None and the findings to report."""
    name = type(model).__name__
    try:
        small = small_copy(unwrapped(model))
        prepare_for_training(small)
        own = [own_logits(small, ids) for ids in _whole_sequences(EXAMPLES)]
        if all(bool(logits.isfinite().all()) for logits in own):
            return small, None
        reason = "its logits are not finite"
    except Exception as error:  # a class may raise anything for settings that were never tried
        reason = f"{type(error).__name__}: {reason_of(error)[:160]}"
    line = f"{name}: no small copy could be built for the check ({reason}); only its real weights are checked"
    return None, Findings(trees, True, "product", (line,))


def examine(model: Any, scores: bool = False, lora: LoraSettings | None = None) -> Findings:
    """Compare the paths of a small copy with its own forward, for a causal model or one that ``scores``."""
    name, trees = type(model).__name__, reads_trees(model)
    small, found = working_copy(model, trees)
    if found is not None:
        return found
    if not scores and (refusal := _not_causal(name, small)) is not None:
        return Findings(False, True, "product", (), refusal)
    checked: CausalLM | ScalarModel = (ScalarModel(small) if scores else CausalLM(small)).eval()
    what, told = ("scores", "{:.2g}".format) if scores else ("log-probabilities", _nats)
    path, gap = _settle_padded(checked)
    if path is None:
        sentence = f"{name}: {what} differ from the model's own forward by {told(gap)}, for every way of computing them"
        return Findings(False, True, "product", (), ("self-check-failed", f"{sentence}; start from another model"))
    lines = []
    if path != "product":
        lines.append(
            f"{name}: log-probabilities from the LM head's weight differ from the model's own by {told(gap)}; "
            f"logits come from {PATHS[path]}"
        )
    if not checked.pads_rows:
        lines.append(
            f"{name}: {what} in padded rows differ from those of single sequences by {told(gap)}; sequences of "
            "different lengths are forwarded separately"
        )
    if trees and checked.pads_rows:
        gap = max(_gap(checked, part, _packed(part)) for part in ((EXAMPLES,) if scores else (ONE_EACH, EXAMPLES)))
        if gap > CLOSE:
            lines.append(f"{name}: {PACKED_DIFFER.format(told(gap))}")
        trees = gap <= CLOSE
    if lora is not None and isinstance(checked, CausalLM):
        lines += _gradients_of_adapter(name, small, lora, checked)
    return Findings(trees and checked.pads_rows, checked.pads_rows, path, tuple(lines))


PACKED_DIFFER = "packed rows differ from the model's own forward by {}; each sequence gets its own row"


def _settle_padded(checked: CausalLM | ScalarModel) -> tuple[LogitsPath | None, float]:
    """Set the first path for padded rows that agrees; return it, and the difference of the first path tried."""
    first = None
    paths: tuple[LogitsPath, ...] = get_args(LogitsPath) if isinstance(checked, CausalLM) else ("product",)
    for pads, path in itertools.product((True, False), paths):
        checked.pads_rows = pads
        if isinstance(checked, CausalLM):
            checked.logits_path = path
        gap = _gap(checked, EXAMPLES, padded_layout(EXAMPLES))
        first = gap if first is None else first
        if gap <= CLOSE:
            return path, first
    return None, first or 0.0


PATHS: dict[LogitsPath, str] = {
    "product": "the LM head's weight",
    "head": "the model's own head",
    "forward": "the model's own forward, which keeps the logits of whole sequences in memory",
}


def _sequences(
    prompts: Sequence[int], completions: Sequence[int], parents: Sequence[int], vocabulary: int = VOCABULARY
) -> Sequences:
    """Return sequences of the given lengths, with random ids from a fixed seed."""
    generator = torch.Generator().manual_seed(3)
    lengths = (*prompts, *completions)
    ids = tuple(torch.randint(5, VOCABULARY - 4, (length,), generator=generator) % vocabulary for length in lengths)
    drawn = ids[len(prompts) :]
    return Sequences(
        ids[: len(prompts)], drawn, tuple(parents), tuple(torch.ones(len(one), dtype=torch.bool) for one in drawn)
    )


EXAMPLES = _sequences((9, 5, 12), (6, 9, 4, 7, 3), (0, 1, 2, 0, 0))
"""Prompts with one or several completions, longer than the limits of a small copy."""


def _whole_sequences(sequences: Sequences) -> list[Tensor]:
    pairs = zip(sequences.parents, sequences.completions, strict=True)
    return [torch.cat([sequences.prompts[parent], completion]) for parent, completion in pairs]


def _packed(sequences: Sequences) -> Layout:
    """Pack all prompts, each with its completions, into one row."""
    return packed_layout(sequences, list(trees_of(sequences)))


ONE_EACH = select(EXAMPLES, [0, 1, 2])
"""The same prompts with one completion each."""


@torch.no_grad()
def own_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a model's own forward of one sequence, fp32 or wider, shape (tokens, vocabulary).

    ``model`` is a Hugging Face model, or a CausalLM, whose call gathers sharded weights.
    """
    ids = ids.to(next(model.parameters()).device)
    if isinstance(model, CausalLM):
        return at_least_float32(model(OwnLogits(ids)))
    return at_least_float32(unwrapped(model)(input_ids=ids.unsqueeze(0), use_cache=False).logits[0])


def own_logprobs(model: Any, prompt: Tensor, completion: Tensor) -> Tensor:
    """Return log-probabilities of a completion's tokens from the model's own forward of this single sequence."""
    logits = own_logits(model, torch.cat([prompt, completion]))
    return token_logprobs(logits[len(prompt) - 1 : -1], completion.to(logits.device)).cpu()


@torch.no_grad()
def differences(policy: CausalLM, sequences: Sequences, layout: Layout) -> Tensor:
    """Return the absolute difference between our and the model's own log-probability of each completion token, nats."""
    found = policy(layout.to(next(policy.parameters()).device)).logprobs.cpu()
    gap = []
    for row, parent, completion in zip(itertools.count(), sequences.parents, sequences.completions, strict=False):
        expected = own_logprobs(policy, sequences.prompts[parent], completion)
        gap.append((found[row, : len(completion)] - expected).abs())
    return torch.cat(gap).nan_to_num(torch.inf)


@torch.no_grad()
def _gap(checked: CausalLM | ScalarModel, sequences: Sequences, layout: Layout) -> float:
    try:
        if isinstance(checked, CausalLM):
            return float(differences(checked, sequences, layout).max())
        expected = torch.stack([own_logits(checked.model, ids) for ids in _whole_sequences(sequences)])
        return float((checked(layout).view_as(expected) - expected).abs().nan_to_num(torch.inf).max())
    except Exception:  # an unsupported path may raise anything
        return float("inf")


def _nats(gap: float) -> str:
    return "an error" if gap == float("inf") else f"{gap:.2g} nats"


def _not_causal(name: str, small: Any) -> tuple[str, str] | None:
    """Return the refusal of a model whose tokens attend to later tokens; None for a causal model."""
    ids = _whole_sequences(EXAMPLES)[0]
    other = ids.clone()
    other[-1] = (other[-1] + 1) % VOCABULARY
    gap = (own_logits(small, ids)[:-1] - own_logits(small, other)[:-1]).abs().max()
    if float(gap) <= CLOSE:
        return None
    return (
        "not-causal",
        f"{name} is an encoder or a prefix language model: its tokens attend to later tokens, so it has no next-token "
        "probabilities; train a causal language model (a decoder), or set is_decoder in its config if it is one",
    )


def _gradients_of_adapter(name: str, small: Any, lora: LoraSettings, checked: CausalLM) -> list[str]:
    """Return a message about adapted layers that get no gradient."""
    tokens: list[str | int] = [5, 6] if lora.trained_tokens else []
    asked = replace(lora, r=2, alpha=4, dropout=0.0, trained_tokens=tokens)
    adapted = add_lora(copy.deepcopy(small), asked, "CAUSAL_LM")
    policy = CausalLM(adapted)
    policy.pads_rows = checked.pads_rows
    if policy.logits_path == "product":
        policy.logits_path = checked.logits_path
    logprobs = policy(padded_layout(EXAMPLES)).logprobs
    if not logprobs.requires_grad:
        raise ModelError(
            "no-adapter-gradient",
            f"{name} passes no gradient to an adapter on frozen weights; train every weight (lora: null)",
        )
    logprobs.sum().backward()
    weights = {
        key: weight for key, weight in adapted.named_parameters() if "lora_B" in key or "lora_embedding_B" in key
    }
    still = [key for key, weight in weights.items() if weight.grad is None or not bool(weight.grad.any())]
    if not still:
        return []
    layer = still[0].removeprefix("base_model.model.").split(".lora_")[0]
    return [f"{name}: {len(still)} of {len(weights)} adapted layers get no gradient from text input ({layer} ...)"]


# -- real weights -----------------------------------------------------------------------------------------------------


def check_weights(model: CausalLM | ScalarModel, autocast: AbstractContextManager[Any] | None = None) -> None:
    """Check two short sequences on the real weights, and fall back to another path if one disagrees.

    Args:
        model: the loaded model, on its device; with sharded weights every rank must call.
        autocast: the precision context of the run; None for none.

    Raises:
        ModelError: no path agrees.
    """
    with inference_mode_of(model), autocast or nullcontext():
        if isinstance(model, CausalLM):
            _check_policy(model)


def _check_policy(policy: CausalLM) -> None:
    inner = unwrapped(policy.model)
    name, rows = type(inner).__name__, vocabulary_rows(inner)
    sequences = _sequences((6,), (5, 3), (0, 0), rows)
    told: list[str] = []
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else next(policy.parameters()).dtype
    limit = CLOSE_BY_DTYPE.get(dtype, CLOSE)

    def gap(layout: Layout) -> float:
        try:
            return float(differences(policy, sequences, layout).mean())
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            if is_sharded(policy):
                raise  # other ranks wait in a collective
            told.append(f"{type(error).__name__}: {reason_of(error)[:160]}")
            return float("inf")

    if policy.reads_trees and (found := gap(_packed(sequences))) > limit:
        policy.reads_trees = False
        rank_zero_info(f"{name} with these weights: {PACKED_DIFFER.format(_nats(found))}")
    if policy.reads_trees:
        return
    if is_sharded(policy) and not policy.pads_rows:
        raise ModelError(
            "sharded-lengths",
            f"{name}: each length needs its own forward pass, so ranks with other lengths would block while weights "
            "are sharded; train it without sharding",
        )
    paths = get_args(LogitsPath)
    first = None
    for path in paths[paths.index(policy.logits_path) :]:
        policy.logits_path = path
        found = gap(padded_layout(sequences))
        if found <= limit:
            if first is not None:
                rank_zero_info(
                    f"{name}: log-probabilities of these weights differ from the model's own forward by "
                    f"{_nats(first)}; logits come from {PATHS[path]}"
                )
            return
        first = found if first is None else first
    reason = f" ({told[-1]})" if told else ""
    raise ModelError(
        "self-check-failed",
        f"{name}: log-probabilities of these weights differ from the model's own forward by {_nats(first or 0.0)} "
        f"in {dtype}, for every way of computing them{reason}; try another dtype or attn_implementation, or set "
        "self_check: false if you know that its forward is not a valid comparison",
    )
