"""Accept objects of other libraries: loaded models, data sets, peft's settings, Lightning's hooks."""

from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_tokenizer, refused
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig
from tiny_run import NumbersDataModule, SlopeModule
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.data import PreferenceDataModule, PromptDataModule
from rlhf_lightning.models.lora import LoraSettings, lora_settings
from rlhf_lightning.modules import DPOModule, RewardModule, RLOOModule
from rlhf_lightning.scoring.learned import LearnedScorer

PAIRS = [{"prompt": f"a{number}", "chosen": "bc", "rejected": "d"} for number in range(6)]


def trainer(*callbacks: Callback) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=list(callbacks), **quiet)


def of_data_sets() -> Any:
    import datasets

    return datasets.Dataset.from_list(PAIRS)


@pytest.mark.parametrize("source", [list(PAIRS), of_data_sets], ids=["list", "Dataset"])
def test_loaded_objects_train_as_folder_names_do(source: Any, tmp_path: Path) -> None:
    """A model, its tokenizer, peft's LoRA settings and rows in memory; then a folder that transformers loads."""
    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    module = DPOModule(init_from=LlamaForCausalLM(config), tokenizer=tokenizer, lora=lora, self_check=False)
    data = PreferenceDataModule(source() if callable(source) else source, batch_size=3)
    assert module.lora == LoraSettings(r=2, alpha=4, targets=["q_proj"])
    assert Path(module.hparams["init_from"]).is_dir() and Path(data.hparams["source"]).is_file()
    trainer().fit(module, datamodule=data)
    assert module.updates == 2
    folder = module.save_pretrained(tmp_path / "model")
    assert (folder / "adapter_config.json").is_file() and (folder / "README.md").is_file()
    assert AutoModelForCausalLM.from_pretrained(module.init_from).config.hidden_size == 16


def test_unsupported_peft_settings_are_refused() -> None:
    assert lora_settings(LoraConfig(use_dora=True)).dora
    with refused("unsupported-lora", "bias"):
        lora_settings(LoraConfig(bias="all"))


def test_rows_that_are_not_json_are_refused() -> None:
    with refused("not-json"):
        PreferenceDataModule([{"prompt": object()}])


def test_a_loader_of_rows_is_refused_with_the_remedy() -> None:
    with refused("no-step", "as its source"):
        trainer().fit(SlopeModule(), DataLoader(PAIRS, batch_size=2))  # type: ignore[arg-type]


def test_callbacks_get_loss_and_metrics_of_a_step() -> None:
    seen: list[Any] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs)

    trainer(Watch()).fit(SlopeModule(learning_rate=0.1), datamodule=NumbersDataModule())
    assert len(seen) == 8 and float(seen[0]["loss"]) == float(seen[0]["train/loss"]) > 0
    assert "train/slope" in seen[0]


def test_a_reward_model_warns_about_prompts_in_another_format(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """The folder records the format; prompts as messages get other scores than plain text. Two tokens end no
    completion.
    """
    tokenizer = make_tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    reward = RewardModule(init_from=policy, tokenizer=tokenizer, self_check=False)
    trainer().fit(reward, datamodule=PreferenceDataModule(PAIRS, batch_size=3))
    folder = str(reward.save_pretrained(tmp_path / "reward"))
    assert LearnedScorer(folder).prompt_form == "plain text"
    chats = PromptDataModule(
        [{"prompt": row["prompt"]} for row in PAIRS], batch_size=6, samples_per_prompt=2, as_chat=True
    )
    ppo = RLOOModule(init_from=policy, tokenizer=tokenizer, scorer=folder, max_new_tokens=2, self_check=False)
    recwarn.clear()
    trainer().fit(ppo, datamodule=chats)
    told = [str(warning.message) for warning in recwarn]
    assert any("written as plain text, but these are messages" in text and "as_chat to false" in text for text in told)
    assert any("were truncated: raise it" in text for text in told)
