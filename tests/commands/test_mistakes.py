"""Newcomers' mistakes get a one-sentence error with the remedy and no traceback."""

import json
from pathlib import Path

import lightning.pytorch  # noqa: F401 - its log handler keeps the stderr of the moment at which it is imported
import pytest

from rlhf_lightning.cli import main as rlhf

PAIRS = [{"prompt": f"a{number}", "chosen": "bc", "rejected": "d"} for number in range(8)]
FILES = {
    "pairs.jsonl": PAIRS,
    "alike.jsonl": [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 4,
    "texts.jsonl": [{"text": "a"}] * 4,
    "answers.jsonl": [{"prompt": "a", "completion": "b"}] * 4,
    "chats.jsonl": [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}] * 4,
    "prompts.jsonl": [{"prompt": f"a{number}"} for number in range(8)],
    "nameless.jsonl": [{"question": "a", "good": "b", "bad": "c"}] * 4,
}
SCORERS = """
def short(prompts, completions, **columns):
    return [1.0]

def good(prompts, completions, **columns):
    return [1.0 for _ in completions]

def texts(prompts, completions, **columns):
    return ["good"] * len(completions)

def single(text):
    return 1.0

def careless():
    return 1.0

async def later(prompts, completions, **columns):
    return [1.0 for _ in completions]

def broken(prompts, completions, **columns):
    return [columns["rubric"] for _ in completions]
"""
CPU = "--trainer.accelerator cpu --trainer.max_steps 1 --model.self_check false"
DPO = f"fit --model DPOModule --model.init_from POLICY --data PreferenceDataModule --data.source pairs.jsonl {CPU}"
SFT = f"fit --model SFTModule --model.init_from POLICY --data SFTDataModule --data.source answers.jsonl {CPU}"
GRPO = f"fit --model GRPOModule --model.init_from POLICY --data PromptDataModule --data.source prompts.jsonl {CPU}"
GRPO = f"{GRPO} --data.batch_size 4 --model.max_new_tokens 2"
SCORED = f"{GRPO} --model.scorer scorers"
BEST = "best-of-n --model POLICY --scorer scorers.texts --prompts prompts.jsonl --out a.jsonl"

MISTAKES = {
    # the command line
    "a command of another name": ("train --config recipe:dpo", "did you mean fit?"),
    "a recipe as a command": ("dpo --data.source pairs.jsonl", "rlhf fit --config recipe:dpo"),
    "a command that is nothing": ("xyzzy", "the commands are fit"),
    "a file that is not there": ("fit --config dpo.yml", "dpo.yml"),
    "a recipe as a file": ("fit --config recipes/dpo.yaml", "recipe:dpo is packaged"),
    "a recipe of another name": ("fit --config recipe:dop", "did you mean dpo"),
    "a trainer's name": ("fit --model PPOTrainer --data PromptDataModule", "did you mean PPOModule"),
    "a config's name": ("fit --model DPOConfig --data PreferenceDataModule", "did you mean DPOModule"),
    "another library's rate": (f"{DPO} --model.lr 1e-5", "--model.learning_rate"),
    "another library's rank": (f"{DPO} --model.lora_r 8", "--model.lora.r"),
    "another library's batch": (f"{DPO} --per_device_train_batch_size 8", "--data.micro_batch_size"),
    "another library's accumulation": (f"{DPO} --gradient_accumulation_steps 8", "--data.batch_size"),
    "another library's epochs": (f"{DPO} --num_train_epochs 3", "--trainer.max_epochs"),
    "another library's length": (f"{GRPO} --max_completion_length 64", "--model.max_new_tokens"),
    "another library's group": (f"{GRPO} --num_generations 4", "--data.samples_per_prompt"),
    "an older trainer's devices": (f"{DPO} --trainer.gpus 1", "--trainer.devices"),
    "a misspelt setting": (f"{DPO} --model.beat 0.1", "the nearest is --model.beta"),
    "a setting of another part": (f"{DPO} --model.batch_size 8", "--data.batch_size"),
    "a setting of another objective": (f"{DPO} --model.kl_coef 0.1", "is not an argument of DPOModule"),
    "a recipe without its option": ("fit recipe:dpo", "such as --config recipe:dpo"),
    "an objective without its option": ("fit DPOModule", "such as --model DPOModule"),
    "a file without its option": (f"{DPO} more.jsonl --seed_everything 1", "such as --data.source more.jsonl"),
    "settings as equations": (f"{DPO} model.beta=0.2", "written --model.beta=0.2"),
    "files that the shell spelt out": (
        f"{DPO} --data.source pairs.jsonl chats.jsonl", "--data.source '[pairs.jsonl, chats.jsonl]'",
    ),
    "a misspelt option of plan": ("plan --config recipe:dpo --memry 80", "the nearest is --memory"),
    "a misspelt setting of a loop": ("loop --config recipe:labels/loop --runds 1", "the nearest is --rounds"),
    "no model at all": ("fit", "missing: --model CLASS and --data CLASS"),
    "no scorer": (GRPO, "GRPOModule needs --model.scorer"),
    "a text as a number": (f"{DPO} --model.beta high", "model.beta must be a number, not high"),
    "half an adapter's rank": (f"{DPO} --model.lora.r 8.5", "model.lora.r must be a whole number, not 8.5"),
    "a seed that is a text": (f"{DPO} --seed_everything x", "seed_everything"),
    "a run name outside the runs": (f"{DPO} --run_name ../mine", "run_name is"),
    "a version as a run name": (f"{DPO} --run_name dpo/version_0", "leave out version_0"),
    "a file as the folder of runs": (f"{DPO} --runs_folder empty.jsonl", "choose another --runs_folder"),
    "the best checkpoint of a new run": (f"{DPO} --ckpt_path best", "--resume RUN"),
    "a misspelt option of a tool": ("quickstart --sed 1", "unrecognized arguments: --sed"),
    "a model as objective": ("fit --model org/model --data PreferenceDataModule", "--model.init_from org/model"),
    "a short name of a model": ("fit --model gpt2 --data PreferenceDataModule", "give the model to start from as "
    "--model.init_from"),
    "a file as DataModule": ("fit --model DPOModule --data pairs.jsonl", "--data.source pairs.jsonl"),
    "one hyphen": (f"{DPO} -model.beta 0.2", "two hyphens: --model.beta"),
    "a seed by its short name": (f"{DPO} --seed 3", "use --seed_everything"),
    "an adapter as a number": (f"{DPO} --model.lora 8", "--model.lora.r 8"),
    "an adapter as a switch": (f"{DPO} --model.lora true", "--model.lora.r 16"),
    "an empty config": ("fit --config empty.yaml", "not a mapping of settings"),
    "a config that is a list": ("fit --config list.yaml", "not a mapping of settings"),
    "columns as an equation": (f"{DPO} --data.columns good=chosen", "a mapping such as '{a: b}'"),
    "a stop string without brackets": (f"{SCORED}.good --model.stop_strings User:", "a list such as '[a, b]'"),
    "an empty stop string": (f"{SCORED}.good --model.stop_strings ['']", "a stop string is empty"),
    "a stop token of two tokens": (f"{SCORED}.good --model.stop_tokens [zzz]", "name a single token"),
    # impossible settings
    "a GPU that is not there": (f"{DPO} --trainer.devices -1", "trainer.devices must be"),
    "a strategy that spawns": (f"{DPO} --trainer.strategy ddp_spawn", "use ddp"),
    "a strategy of DeepSpeed": (f"{DPO} --trainer.strategy zero3", "ModelParallelStrategy"),
    "one number for two": (f"{DPO} --model.betas 0.9", "a list such as '[a, b]'"),
    "a metric of no held-out rows": (
        f"{DPO} --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss", "data.eval_rows",
    ),
    "data as a config": ("fit --config pairs.jsonl", "--data.source pairs.jsonl"),
    "a program as a config": ("fit --config scorers.py", "--model scorers.CLASS"),
    "a folder as a config": ("fit --config .", "is a folder"),
    "a misspelt part of a config": ("fit --config moodel.yaml", "the nearest is model"),
    "no update": (DPO.replace("--trainer.max_steps 1", "--trainer.max_steps 0"), "no update would be made"),
    "layers in one text": (f"{DPO} --model.lora.targets q_proj,v_proj", "such as '[q_proj, v_proj]'"),
    "a layer of another name": (f"{DPO} --model.lora.targets [q_proj,query]", "lora.targets names 'query'"),
    "a prompt without room": (f"{DPO} --data.max_length 9 --data.max_prompt_length 9", "smaller max_prompt_length"),
    "a batch of more than all rows": (f"{DPO} --data.batch_size 99 --data.drop_last true", "smaller batch_size"),
    "an uneven group": (f"{SCORED}.good --data.samples_per_prompt 3", "multiple of samples_per_prompt"),
    "a negative beta": (f"{DPO} --model.beta -0.1", "beta of DPOModule is -0.1"),
    "a negative rate": (f"{DPO} --model.learning_rate -1e-5", "learning_rate of DPOModule is -1e-05"),
    "a share above one": (f"{DPO} --model.label_smoothing 0.7", "label_smoothing"),
    "no rows in a batch": (f"{DPO} --data.batch_size 0", "batch_size is 0: it must be at least 1"),
    "negative held-out rows": (f"{DPO} --data.eval_rows -1", "eval_rows is -1"),
    "a rank of zero": (f"{DPO} --model.lora.r 0", "r of LoraSettings is 0"),
    "clipping at zero": (f"{DPO} --model.max_grad_norm 0", "max_grad_norm"),
    "half precision": (f"{DPO} --trainer.precision 16-mixed", "use bf16-mixed or 32-true"),
    "a strategy of another name": (f"{DPO} --trainer.strategy deepspeed", "ModelParallelStrategy"),
    "weights in 4 bits that are trained": (f"{DPO} --model.quantization nf4", "set lora"),
    "weights in half precision that are trained": (f"{DPO} --model.dtype bfloat16", "bf16-mixed"),
    "an optimizer of another name": (f"{DPO} --model.optimizer Adamm", "torch.optim.Adam"),
    "two optimizers' settings": (f"{DPO} --model.optimizer torch.optim.SGD --model.weight_decay 1", "weight_decay"),
    "an endless schedule": (f"{DPO} --trainer.max_steps -1 --trainer.max_epochs -1", "set trainer.max_epochs or"),
    "one sample for a group": (f"{SCORED}.good --data.samples_per_prompt 1", "samples_per_prompt"),
    "two ways of holding out": (f"{DPO} --data.eval_rows 2 --data.eval_source pairs.jsonl", "set eval_source null"),
    # data
    "data that are not there": (f"{DPO} --data.source mine.jsonl", "mine.jsonl"),
    "a suffix of another file": (f"{DPO} --data.source pairs.json", "the nearest is 'pairs.jsonl'"),
    "an address as source": (f"{DPO} --data.source https://host/pairs.jsonl", "give a downloaded file"),
    "a slice as in Python": (f"{DPO} --data.source pairs.jsonl[:4]", "split: 'train[:4]'"),
    "columns between semicolons": (f"{DPO} --data.source excel.csv", "save it with commas"),
    "a split as an option": (f"{DPO} --data.split test", "--data.source"),
    "an empty file": (f"{DPO} --data.source empty.jsonl", "empty.jsonl"),
    "a line that is not JSON": (f"{DPO} --data.source broken.jsonl", "broken.jsonl"),
    "columns of other names": (f"{DPO} --data.source nameless.jsonl", "columns"),
    "demonstrations for DPO": (f"{DPO} --data.source answers.jsonl", "answers.jsonl"),
    "pairs for SFT": (f"{SFT} --data.source pairs.jsonl", "those of PreferenceDataModule"),
    "pairs that are alike": (f"{DPO} --data.source alike.jsonl", "alike"),
    "messages without a template": (f"{DPO.replace('POLICY', 'PLAIN')} --data.source chats.jsonl", "chat template"),
    "a template file that is not there": (f"{DPO} --model.chat_template mine.jinja", "mine.jinja"),
    "an audit of no file": ("audit mine.jsonl --tokenizer POLICY", "mine.jsonl"),
    "a row beyond the end": ("show pairs.jsonl --tokenizer POLICY --row 99", "fewer than 99 rows"),
    # models and scorers
    "a model that is not there": (f"{DPO} --model.init_from models/mine", "models/mine"),
    "a reward model as policy": (DPO.replace("POLICY", "REWARD"), "REWARD"),
    "a policy as reward model": (f"{GRPO} --model.scorer POLICY", "POLICY"),
    "a scorer of another name": (f"{SCORED}.nope", "scorers"),
    "a file as scorer": (f"{GRPO} --model.scorer ./scorers.py", "such as scorers.score"),
    "a scorer with a colon": (f"{GRPO} --model.scorer scorers:good", "scorers.good"),
    "a module as scorer": (f"{GRPO} --model.scorer scorers", "scorers is a module"),
    "a scorer with too few scores": (f"{SCORED}.short", "it must return one for each"),
    "a scorer of one text": (f"{SCORED}.single", "single(prompts, completions, **columns)"),
    "a scorer of texts": (f"{SCORED}.texts", "must return one number for each completion"),
    "a scorer without its column": (f"{SCORED}.broken", "rename one by data.columns"),
    # runs and tools
    "a resumed run that is not there": ("fit --resume mine", "no run found at mine"),
    "an evaluation as a resumed run": ("validate --resume mine", "`rlhf validate mine`"),
    "an export without a place": ("export runs/mine", "out"),
    "prompts that are not there": ("generate --model POLICY --prompts mine.jsonl --out a.jsonl", "mine.jsonl"),
    "an output over the input": (
        "generate --model POLICY --prompts prompts.jsonl --out prompts.jsonl",
        "is the file that is read",
    ),
    "a port beyond the last": ("serve POLICY --port 99999", "name another --port"),
    "a reward model to talk to": ("chat REWARD", "is a reward model"),
    "an output without a model": ("generate --prompts prompts.jsonl --out a.jsonl", "model"),
    "a threshold that is missing": (
        f"{BEST} --keep threshold",
        "keep=threshold needs threshold",
    ),
    "a row before the first": ("show pairs.jsonl --tokenizer POLICY --row 0", "both count from 1"),
    "a file to export": ("export pairs.jsonl --out a", "not a .ckpt file of a run"),
    "a file that workers share": ("rollout-worker pairs.jsonl", "pairs.jsonl is a file: name the folder"),
    "a worker's device": ("rollout-worker jobs --device gpu", "device 'gpu' cannot be used"),
    "a gold reward of no module": ("evaluate POLICY --prompts prompts.jsonl --gold nope", "'nope'; Your own has its"),
    "subsets of no column": ("evaluate-reward scorers.good --pairs pairs.jsonl --subset topic", "a column 'topic'"),
    "findings as a folder": ("audit pairs.jsonl --json .", "name a file"),
    "checks as a folder": ("verify DPOModule --json .", "name a file"),
    "a plan as a folder": (f"plan {DPO[4:]} --json .", "name a file"),
    "a plan of too few tokens": (f"plan {DPO[4:]} --plan.prompt_length -4", "plan.prompt_length is -4"),
    "none of n": (f"{BEST} --n 0", "n is 0"),
    "a store of another ending": ("annotate --store labels.sqlite", "does not end in .db"),
    "a page for everybody": ("annotate --store labels.db --host 0.0.0.0", "annotators ann,bob"),
    "instructions that are not there": ("annotate --store labels.db --instructions guide.md", "Markdown file"),
    "labels of no store": ("annotate export --store labels.db --out a.jsonl", "labels.db"),
    "a comparison of nothing": ("compare runs/mine", "mine"),
    "an objective of another name": ("verify DPO", "DPOModule"),
    "a project with a hyphen": ("init my-project", "such as my_project"),
    "a project of a word of Python": ("init class", "such as my_class"),
    "a project that begins with a digit": ("init 2fast", "such as my_2fast"),
    "a config as an option": ("sweep --config recipe:dpo", "without --config"),
    "a model without its option": ("generate POLICY prompts.jsonl", "such as --model POLICY"),
    "two models to talk to": ("chat POLICY REWARD", "unexpected argument 'REWARD'"),
    "an objective to list": ("objectives DPO", "such as --name DPO"),
    "a folder as an output": ("generate --model POLICY --prompts prompts.jsonl --out .", "name a file"),
    "a file as the quickstart's folder": ("quickstart --out pairs.jsonl", "name a folder"),
    "a recipe of another command": ("loop --config recipe:labels/dpo", "is a setting of `rlhf fit`"),
    "a labeller of another name": ("loop --config recipe:labels/loop --labeller Ann", "there is no class Ann"),
    "less than no memory": ("plan --config recipe:dpo --model.init_from POLICY --memory -1", "the GB of a device"),
    "a scorer without arguments": (f"{SCORED}.careless", "careless(prompts, completions, **columns)"),
    "a scorer that waits": (f"{SCORED}.later", "give a regular function"),
}  # fmt: skip


@pytest.fixture
def files() -> None:
    for name, rows in FILES.items():
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name in ("empty.jsonl", "empty.yaml"):
        Path(name).write_text("")
    Path("moodel.yaml").write_text("moodel: {class_path: DPOModule}\n")
    Path("excel.csv").write_text("prompt;chosen;rejected\na;b;c\n")
    Path("list.yaml").write_text("- a\n- b\n")
    Path("broken.jsonl").write_text('{"prompt": "a", \n')
    Path("scorers.py").write_text(SCORERS)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_prints_one_sentence_with_the_remedy(
    mistake: str, files: None, policy_folder: str, plain_folder: str, reward_folder: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(".")
    command, words = MISTAKES[mistake]
    folders = {"POLICY": policy_folder, "PLAIN": plain_folder, "REWARD": reward_folder}
    argv = [folders.get(word, word) for word in command.split()]
    try:
        status = rlhf(argv)
    except SystemExit as exit_status:
        status = exit_status.code
    told = capsys.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith(("rlhf", "usage: rlhf", "missing")) or words in line]
    assert status in (1, 2), f"status {status}: {told[-500:]}"
    assert "Traceback" not in told
    for name, folder in folders.items():
        words = words.replace(name, folder)
    said = [line for line in lines if words in line]
    assert said, f"{words!r} is not in: {told[-700:]}"
    assert len(said[0]) < 700


def test_at_least_130_mistakes_are_tested() -> None:
    assert len(MISTAKES) >= 130
