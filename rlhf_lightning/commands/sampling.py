"""The sampling arguments that generate, best-of-n, critique, label, annotate and chat share."""

# No postponed annotations: jsonargparse reads these types, and nothing heavy may be imported for help.

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rlhf_lightning.errors import SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_lightning.models.causal_lm import CausalLM
    from rlhf_lightning.sampling.engines import SamplingEngine, SamplingSettings


@dataclass(frozen=True)
class SamplingArguments:
    """How a command samples completions; `run_function` makes a flag of each field.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        max_new_tokens: longest completion, tokens.
        top_p: keep the smallest set of tokens with this probability.
        top_k: keep this many likeliest tokens; 0 keeps all.
        batch_size: completions decoded side by side, or requests in flight.
        engine: what draws: SlotEngine (default), GenerateEngine, your own, or {class_path: RemoteEngine, ...}.
        chat_template: template to use instead of the tokenizer's own.
        dtype: precision of the weights, float32 or bfloat16.
        seed: seed of the sampling and of every other random choice of the command.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 16
    engine: dict[str, Any] | str | None = None
    chat_template: str | None = None
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SettingError("setting-out-of-range", f"batch_size is {self.batch_size}: it must be at least 1")

    def settings(self) -> "SamplingSettings":
        """Return the settings of the engine.

        Raises:
            ValueError: a value is out of range.
        """
        from rlhf_lightning.sampling.engines import SamplingSettings

        return SamplingSettings(self.max_new_tokens, self.temperature, self.top_p, self.top_k, self.batch_size)

    def make_engine(self) -> "SamplingEngine":
        """Return the engine that is asked for.

        Raises:
            SettingError: see `loading.load`.
        """
        from rlhf_lightning.sampling.engines import load_engine

        return load_engine(self.engine)

    def load(self, model: str) -> "tuple[CausalLM, PreTrainedTokenizerBase]":
        """Load a policy and its tokenizer, see `commands.generate.load_for_sampling`."""
        from rlhf_lightning.commands.generate import load_for_sampling

        return load_for_sampling(model, self.dtype, self.chat_template)

    def provenance(self) -> dict[str, Any]:
        """Return what decides the samples beside model and seed, in plain values."""
        drawn = {name: value for name, value in asdict(self.settings()).items() if name != "batch_size"}
        return {**drawn, "engine": self.engine} if self.engine is not None else drawn
