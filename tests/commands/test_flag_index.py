"""Test the index of settings: up to date, fast, and with the names used by other libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_lightning import cli
from rlhf_lightning.commands import flag_index
from rlhf_lightning.commands.flag_index import (
    INDEX,
    all_names,
    foreign_names,
    quick_answer,
    source_digests,
    suggestion,
)
from rlhf_lightning.commands.objectives import build_index, plain_help, type_text

ROWS = foreign_names()["settings"]
REMEDY = "run `python -m rlhf_lightning.commands.objectives` and commit flag_index.json"


def test_the_flag_index_is_current():
    assert build_index() == INDEX.read_text(encoding="utf-8"), REMEDY
    assert not flag_index.is_stale(), REMEDY


def test_the_index_depends_on_names_in_the_sources_and_not_on_times(tmp_path):
    source = tmp_path / "modules" / "own.py"
    source.parent.mkdir()
    text = "class Own:\n    def __init__(self, beta: float = 1.0) -> None:\n        self.beta = beta\n"
    source.write_text(text)
    known = source_digests(tmp_path)
    os.utime(source, (2**31, 2**31))
    assert source_digests(tmp_path) == known
    for changed, stale in (
        (text.replace("= beta", "= 2 * beta"), False),
        (text.replace(") ->", ", gamma: float = 1.0) ->"), True),
        (text.replace("(self, beta", "(\n        self,\n        beta_2"), True),
        (text.replace("Own", "Other"), True),
    ):
        source.write_text(changed)
        assert (source_digests(tmp_path) != known) == stale, changed


def test_foreign_names_map_to_existing_settings():
    assert len(ROWS) >= 130
    targets = {target for row in ROWS.values() for target in row.split()}
    assert targets <= all_names()
    assert not [name for name in ROWS if name in all_names()]
    assert set(foreign_names()["classes"].values()) <= flag_index.index()["model"].keys()


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("per_device_train_batch_size", "use --data.micro_batch_size and --data.batch_size"),
        ("gradient_accumulation_steps", "use --data.batch_size and --data.micro_batch_size"),
        ("num_train_epochs", "use --trainer.max_epochs"),
        ("num_generations", "use --data.samples_per_prompt"),
        ("max_completion_length", "use --model.max_new_tokens"),
        ("lora_r", "use --model.lora.r"),
        ("actor_rollout_ref.rollout.n", "use --data.samples_per_prompt"),
        ("actor_rollout_ref.actor.optim.lr", "use --model.learning_rate"),
        ("epochs", "the nearest is --trainer.max_epochs"),
        ("model.lora.rank", "use --model.lora.r"),
        ("wholly_different_thing", None),
    ],
)
def test_a_flag_of_another_library_suggests_its_setting(given, hint):
    assert suggestion(given, all_names()) == hint


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--num_train_epochs 3", "there is no setting --num_train_epochs; use --trainer.max_epochs"),
        ("--trainer.max_epoch 3", "there is no setting --trainer.max_epoch; the nearest is --trainer.max_epochs"),
        ("--model DPOModule --model.betta 3", "is not an argument of DPOModule; the nearest is --model.beta"),
        ("--config recipe:dpo --model.betta 3", "--model.betta is not an argument of DPOModule; the nearest is"),
        ("--model DPOModule --model.kl_coef 3", "`rlhf fit --model.help DPOModule` lists its arguments"),
        ("--model DPOModule --model.num_train_epochs 3", "use --trainer.max_epochs"),
        ("--model DPOTrainer", "there is no class DPOTrainer; did you mean DPOModule?"),
        ("--model my_file.Own --model.betta 3 --zzz 1", "there is no setting --zzz"),
        ("", "missing: --model CLASS and --data CLASS, or a --config file"),
    ],
)  # fmt: skip
def test_a_wrong_flag_is_answered_from_the_flag_index(flags, sentence):
    answered = quick_answer(["fit", *flags.split()])
    assert answered is not None and answered.status == 2 and sentence in answered.text


@pytest.mark.parametrize(
    "flags",
    [
        "--model my_file.Own --model.betta 3",
        "--model DPOModule --model.lora.r 4 --model.init_args.beta 1 --model.optimizer.init_args.lr 1",
        "--config recipe:ppo -c recipe:hardware/fsdp --trainer.strategy.data_parallel_size 2 --model.scorer.limit 1",
        "--trainer.callbacks+ x --trainer.logger CSVLogger --print_config --model.class_path DPOModule",
        "--model AlignmentModule --model.init_from x -c nothing.yaml --resume runs/x --ckpt_path y --seed_everything 1",
        "--model.scorer.help x",
        "--model DPOModule --model.beta -1 --model.learning_rate -.5",
        "--model.lora.targets [a,b] --model.beta=1 --trainer.fast_dev_run --seed_everything 1 --print_config",
    ],
)
def test_valid_flags_and_user_classes_are_left_to_the_parser(flags):
    assert quick_answer(["fit", *flags.split()]) is None


def test_a_stale_index_leaves_flags_to_the_parser(monkeypatch):
    monkeypatch.setattr(flag_index, "is_stale", lambda: True)
    assert quick_answer(["fit", "--model", "DPOModule", "--model.brand_new", "3"]) is None


def test_help_fits_one_page_and_lists_only_accepted_flags(capsys):
    assert cli.main(["fit", "--help"]) == 0
    page = capsys.readouterr().out.splitlines()
    assert len(page) <= 60 and max(map(len, page)) <= 120
    assert all(f"--{word}" in "\n".join(page) for word in ("model.help", "data.help", "help all", "trainer.max_epochs"))
    for word in [line.split()[0] for line in page if line.startswith("  --") and "." in line.split()[0]]:
        assert word[2:] in all_names() or word[2:] in ("model.help", "data.help")
    assert cli.main(["fit", "--help", "trainer"]) == 0
    shown = capsys.readouterr().out
    assert "--trainer.max_epochs int|null  (default 1)" in shown
    assert not [name for name in flag_index.REFUSED if name in shown] and ":class:" not in shown


@pytest.mark.parametrize(("command", "option"), [("plan", "memory"), ("loop", "rounds")])
def test_commands_whose_parsers_import_torch_have_a_help_page(command, option, capsys):
    assert cli.main([command, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"usage: rlhf {command} ") and f"--{option} " in page
    assert len(page.splitlines()) <= 100 and max(map(len, page.splitlines())) <= 120
    for value in ("8", "-1"):
        assert quick_answer([command, "--config", "recipe:labels/loop", f"--{option}", value]) is None


def test_help_of_classes_shows_paper_and_arguments(capsys):
    Path("mine.yaml").write_text("model: {class_path: DPOModule}\ndata: {class_path: PreferenceDataModule}\n")
    assert cli.main(["fit", "--config", "mine.yaml", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--model.beta float  (default 0.1)" in shown and "--data.source" in shown and "(required)" in shown
    assert cli.main(["fit", "--model.help", "DPOModule"]) == 0
    shown = capsys.readouterr().out
    assert "2305.18290" in shown and "log sigmoid" in shown and shown.startswith("usage: rlhf fit --model DPOModule")


def test_help_imports_no_parser_and_no_torch(tmp_path):
    code = (
        "import sys; from rlhf_lightning.cli import main\n"
        "for argv in (['fit', '--help'], ['fit', '--lr', '1'], ['fit', '--model', 'DPOModule', '--help']): main(argv)\n"
        "for argv in (['plan', '--help'], ['loop', '--help'], ['loop', '--runds', '1'], ['sft']): main(argv)\n"
        "try: main(['quickstart', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules)))\n"
        "main(['objectives'])\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    os.utime(INDEX)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.returncode == 0 and "[]" in shown.stdout.splitlines(), shown.stderr


def test_types_and_help_texts_are_plain_text():
    assert type_text(int | None) == "int|null" and type_text(list[str]) == "list"
    assert (
        plain_help("Take a :class:`~torch.x.Thing`\nor ``None``. Default: ``None``.\n\nMore.")
        == "Take a Thing or None."
    )
