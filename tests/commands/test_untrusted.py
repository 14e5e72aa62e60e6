"""Weights, checkpoints, tokenizers and data that contain code are refused, and the code does not run.

Every planted file creates the file ``ran`` if its code runs; tests of the planted files check this.
"""

import contextlib
import io
import json
import pickle
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from pickles import Bomb, by_attribute, calling
from safetensors.torch import save_file
from tiny_run import BASIC

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.runs.checkpoint_metadata import sharded_metadata
from rlhf_lightning.training.checkpoint_state import COUNTERS

RAN = "ran"
CHECKPOINT = "runs/slope/version_0/checkpoints/last.ckpt"


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused; return its one-line message."""
    capsys.readouterr()
    try:
        status = rlhf(argv)
    except SystemExit as end:
        status = end.code  # type: ignore[assignment]
    said = capsys.readouterr().err
    assert status in (1, 2), said
    assert not Path(RAN).exists(), f"{argv} ran the code"
    assert "Traceback" not in said
    return next(line for line in said.splitlines() if line.startswith("rlhf"))


# -- checkpoints ------------------------------------------------------------------------------------------------------


def torch_zip(path: Path) -> None:
    torch.save({"hyper_parameters": {"slope": Bomb(Path(RAN))}, "state_dict": {}}, path)


def torch_legacy(path: Path) -> None:
    torch.save({"hyper_parameters": {"slope": Bomb(Path(RAN))}}, path, _use_new_zipfile_serialization=False)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(Path(RAN))))


def torch_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(Bomb(Path(RAN)))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


BOMBS = [torch_zip, torch_legacy, plain_pickle, torch_tar]


@pytest.mark.parametrize("make", [torch_zip, torch_legacy, plain_pickle])
def test_a_trusting_torch_load_runs_the_planted_code(make: Callable[[Path], None]) -> None:
    make(Path("bomb"))
    with contextlib.suppress(Exception):
        torch.load("bomb", weights_only=False)
    assert Path(RAN).exists()


@pytest.mark.parametrize("make", BOMBS)
def test_a_checkpoint_with_pickled_code_is_refused(
    make: Callable[[Path], None], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path("bomb.ckpt"))
    for command in ("fit", "validate", "test", "predict"):
        said = refused([command, *BASIC, "--ckpt_path", "bomb.ckpt"], capsys)
        assert re.search("not a checkpoint|cannot be read as a checkpoint", said)
    assert "cannot be read as a checkpoint of plain tensors" in refused(["export", "bomb.ckpt", "--out", "out"], capsys)
    for other in Path(CHECKPOINT).parent.glob("*.ckpt"):  # otherwise an older checkpoint would be used
        other.unlink()
    make(Path(CHECKPOINT))
    for command in (["fit", "--resume", "runs/slope"], ["export", "runs/slope", "--out", "out"]):
        assert re.search(
            "no (complete )?checkpoint|not a checkpoint|cannot be read as a checkpoint", refused(command, capsys)
        )
    for command in (["chat"], ["generate", "--prompts", "p.jsonl", "--out", "o.jsonl", "--model"]):
        refused([*command, CHECKPOINT], capsys)


def test_archives_are_never_unpacked_to_disk(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is ever unpacked to disk: neither checkpoints, which are archives, nor data."""
    for name in ("slip.ckpt", "slip.zip"):
        with zipfile.ZipFile(name, "w") as archive, zipfile.ZipFile(CHECKPOINT) as good:
            for entry in good.namelist():
                archive.writestr(entry, good.read(entry))
            archive.writestr("../../outside", "x")
            archive.writestr("/tmp/outside_of_everything", "x")
    before = sorted(Path().absolute().parent.parent.iterdir())
    with contextlib.suppress(SystemExit):
        rlhf(["test", *BASIC, "--ckpt_path", "slip.ckpt"])
    said = refused(["fit", "--model", "SFTModule", "--model.init_from", "none", "--data", "SFTDataModule",
                    "--data.source", "slip.zip"], capsys)  # fmt: skip
    assert said
    assert (
        sorted(Path().absolute().parent.parent.iterdir()) == before and not Path("/tmp/outside_of_everything").exists()
    )
    assert not Path("outside").exists()


def test_a_checkpoint_symlink_that_leaves_the_run_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(CHECKPOINT, "elsewhere.ckpt")
    for name in ("last.ckpt", "best.ckpt"):
        path = Path(CHECKPOINT).with_name(name)
        path.unlink()
        path.symlink_to(Path("elsewhere.ckpt").absolute())
    assert "outside its run" in refused(["fit", "--resume", "runs/slope"], capsys)
    for further in ([], ["--best"]):
        command = ["export", "runs/slope", "--out", "out", "--import", "tiny_run", *further]
        assert "outside its run" in refused(command, capsys)


PEDDLER = "peddler"
"""A module that creates the file when it is imported."""


@pytest.fixture
def peddler() -> str:
    Path(f"{PEDDLER}.py").write_text(f"open({RAN!r}, 'w').close()\n\ndef score(prompts, completions, **columns): ...\n")
    return PEDDLER


@pytest.mark.parametrize(
    "settings",
    [
        {"scorer": f"{PEDDLER}.score"},
        {"scorer": {"class_path": f"{PEDDLER}.Score", "init_args": {}}},
        {"scorer": {"class_path": "rlhf_lightning.scoring.WeightedSum",
                    "init_args": {"scorers": {"a": f"{PEDDLER}.score"}}}},
        {"scorer": "BrevityScorer", "engine": {"class_path": f"{PEDDLER}.Engine"}},
        {"_class_path": f"{PEDDLER}.Module"},
        {"_class_path": "subprocess.Popen", "args": ["touch", RAN]},
    ],
)  # fmt: skip
def test_modules_named_in_a_checkpoint_are_not_imported(
    settings: dict[str, Any], peddler: str, capsys: pytest.CaptureFixture[str], policy_folder: str
) -> None:
    named = {"_class_path": "rlhf_lightning.modules.grpo.GRPOModule", "init_from": policy_folder, **settings}
    progress = dict.fromkeys(COUNTERS, 0)
    checkpoint = {"hyper_parameters": named, "state_dict": {}, "sharded": False, "progress": progress, "trained": [],
                  "started_from": {}, "kl_coef": 0.1, "skipped_in_a_row": 0, "random": [], "scorer": [{}]}  # fmt: skip
    torch.save(checkpoint, "named.ckpt")
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    command = ["test", "--model", "GRPOModule", "--data", "PromptDataModule", "--data.source", "rows.jsonl",
               "--model.init_from", policy_folder, "--ckpt_path", "named.ckpt"]  # fmt: skip
    refused(command, capsys)
    with contextlib.suppress(RuntimeError):  # the folder has no weights either
        refused(["export", "named.ckpt", "--out", "out"], capsys)
    assert not Path(RAN).exists() and PEDDLER not in sys.modules


# -- shards -----------------------------------------------------------------------------------------------------------

ATTACKS = [
    pickle.dumps(Bomb(Path(RAN))),
    calling("os", "system", f"touch {RAN}"),
    calling("torch.distributed.checkpoint.filesystem", "os.system", f"touch {RAN}"),
    calling("torch.distributed.checkpoint.metadata", "os.system", f"touch {RAN}"),
    by_attribute("torch.distributed.checkpoint.filesystem", "os", "system", f"touch {RAN}"),
    by_attribute("builtins", "__import__", "__call__", "antigravity"),
    calling("torch", "hub.os.system", f"touch {RAN}"),
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_shard_metadata_rejects_pickled_objects(attack: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("shards").mkdir()
    Path("shards/meta.pt").touch()
    Path("shards/.metadata").write_bytes(attack)
    assert "cannot be read as a sharded checkpoint of plain tensors" in refused(
        ["test", *BASIC, "--ckpt_path", "shards"], capsys
    )
    with conftest.refused("unreadable-checkpoint", "as a sharded checkpoint of plain tensors"):
        sharded_metadata(Path("shards"))


@pytest.mark.parametrize("attack", [ATTACKS[number] for number in (0, 1, 2, 4)])
def test_a_plain_unpickler_runs_the_shard_attacks(attack: bytes) -> None:
    with contextlib.suppress(Exception):
        pickle.loads(attack)
    assert Path(RAN).exists()


def save_shards(folder: str, **state: Any) -> Path:
    distributed_checkpoint.save({"state_dict": {"w": torch.ones(3)}, **state}, checkpoint_id=folder, no_dist=True)
    return Path(folder)


def test_shards_of_plain_tensors_are_read() -> None:
    found = sharded_metadata(save_shards("good", optimizer_0={"lr": 0.1, "betas": (0.9, 0.99), "step": torch.ones(1)}))
    assert {"state_dict.w", "optimizer_0.lr"} <= set(found.state_dict_metadata)


def test_pickled_objects_in_optimizer_shards_are_refused() -> None:
    path = save_shards("bad", optimizer_0={"lr": Bomb(Path(RAN))})
    assert not Path(RAN).exists()
    with conftest.refused("unreadable-checkpoint", "as a sharded checkpoint of plain tensors"):
        sharded_metadata(path)
    assert not Path(RAN).exists()
    with contextlib.suppress(Exception):
        distributed_checkpoint.load({"optimizer_0": {"lr": 0.0}}, checkpoint_id=path, no_dist=True)
    assert Path(RAN).exists(), "torch itself believes it"


def test_a_shard_symlink_that_leaves_the_checkpoint_is_refused() -> None:
    path = save_shards("linked")
    (shard,) = path.glob("*.distcp")
    shard.rename("outside.distcp")
    shard.symlink_to(Path("outside.distcp").absolute())
    with conftest.refused("unreadable-checkpoint", "outside its folder"):
        sharded_metadata(path)


# -- models and tokenizers --------------------------------------------------------------------------------------------


def fit_on(folder: str) -> list[str]:
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return ["fit", "--model", "SFTModule", "--model.init_from", folder, "--data", "SFTDataModule",
            "--data.source", "rows.jsonl", "--data.batch_size", "4", "--samples.prompts", "0"]  # fmt: skip


def commands_on(folder: str) -> list[list[str]]:
    asked = ["--prompts", "rows.jsonl", "--out", "out.jsonl"]
    return [fit_on(folder), ["chat", folder], ["generate", "--model", folder, *asked],
            ["best-of-n", "--model", folder, "--scorer", "RepetitionPenalty", *asked],
            ["critique", "--model", folder, *asked],
            ["label", "--judge", folder, "--pairs", "pairs.jsonl", "--out", "out.jsonl"]]  # fmt: skip


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training.pt"])
def test_pickled_weights_are_refused(name: str, policy_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(policy_folder, "pickled")
    next(Path("pickled").glob("*.safetensors")).unlink()
    torch.save(Bomb(Path(RAN)), f"pickled/{name}")
    for command in commands_on("pickled"):
        assert f"the weights in pickled are a pickle ({name})" in refused(command, capsys)


def test_pickles_next_to_safetensors_are_not_read(policy_folder: str) -> None:
    shutil.copytree(policy_folder, "both")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save(Bomb(Path(RAN)), f"both/{name}")
    assert rlhf(fit_on("both")) == 0 and not Path(RAN).exists()


def test_a_pickled_adapter_is_refused(policy_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rlhf([*fit_on(policy_folder), "--model.lora.r", "2", "--run_name", "lora"]) == 0
    shutil.copytree("runs/lora/version_0/model", "adapter")
    next(Path("adapter").glob("*.safetensors")).unlink()
    torch.save(Bomb(Path(RAN)), "adapter/adapter_model.bin")
    lora = [*fit_on("adapter"), "--model.lora.r", "2"]
    for command in [*commands_on("adapter"), lora, ["export", "adapter", "--merge", "--out", "merged"]]:
        assert "are a pickle (adapter_model.bin)" in refused(command, capsys)


@pytest.fixture
def with_code(policy_folder: str) -> str:
    """Write a model of a type unknown to transformers, with its modelling and tokenizer code in Python files."""
    shutil.copytree(policy_folder, "with_code")
    folder = Path("with_code")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": names}))
    ran = str(Path(RAN).absolute())
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({ran!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return str(folder)


def test_custom_model_code_runs_only_for_trusted_models(
    with_code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # no question is asked
    for command in commands_on(with_code):
        refused(command, capsys)
    said = refused(fit_on(with_code), capsys)
    assert "--model.trust_remote_code with_code" in said
    refused([*fit_on(with_code), "--model.trust_remote_code", "[another_model]"], capsys)
    assert rlhf([*fit_on(with_code), "--model.trust_remote_code", f"[{with_code}]"]) == 0
    assert Path(RAN).exists()


def test_custom_tokenizer_code_is_not_run(policy_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(policy_folder, "own_tokenizer")
    folder = Path("own_tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {**settings, "tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    (folder / "own.py").write_text(f"open({str(Path(RAN).absolute())!r}, 'w').close()\n")
    for command in commands_on("own_tokenizer"):
        with contextlib.suppress(AssertionError):  # transformers may not need the file
            refused(command, capsys)
        assert not Path(RAN).exists()


@pytest.mark.parametrize(
    "escape",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
    ],
)
def test_chat_templates_are_sandboxed(escape: str, policy_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(policy_folder, "templated")
    for file in Path("templated").glob("chat_template*"):
        file.unlink()
    settings = json.loads(Path("templated/tokenizer_config.json").read_text())
    Path("templated/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": escape}))
    command = fit_on("templated")
    Path("rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"},
                                                           {"role": "assistant", "content": "b"}]}) + "\n")  # fmt: skip
    with contextlib.suppress(AssertionError):
        refused(command, capsys)
    assert not Path(RAN).exists()


def test_code_in_data_sources_is_not_run(capsys: pytest.CaptureFixture[str], policy_folder: str) -> None:
    code = f"open({str(Path(RAN).absolute())!r}, 'w').close()\n"
    Path("dataset").mkdir()
    Path("dataset/dataset.py").write_text(code)
    Path("rows.py").write_text(code)
    Path("rows.pkl").write_bytes(pickle.dumps(Bomb(Path(RAN))))
    for source in ("dataset", "./dataset", "rows.py", "rows.pkl", "dataset/dataset.py"):
        command = fit_on(policy_folder)
        command[command.index("--data.source") + 1] = source
        refused(command, capsys)


def test_the_row_cache_is_read_without_pickle(policy_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row cache is read as plain arrays, because other users may write into a shared cache."""
    import numpy as np

    monkeypatch.setenv("RLHF_CACHE", "cache")
    assert rlhf(fit_on(policy_folder)) == 0
    arrays = list(Path("cache").rglob("*.npy"))
    assert arrays
    for file in arrays:
        np.save(file, np.array([Bomb(Path(RAN))], dtype=object), allow_pickle=True)
    with contextlib.suppress(SystemExit, Exception):
        rlhf(fit_on(policy_folder))
    assert not Path(RAN).exists()


# -- configs and names ------------------------------------------------------------------------------------------------


def test_yaml_tags_for_python_objects_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for tag in (f"!!python/object/apply:os.system ['touch {RAN}']", f"!!python/object/new:os.system ['touch {RAN}']",
                "!!python/name:os.system", "!!python/module:antigravity"):  # fmt: skip
        Path("tagged.yaml").write_text(f"model: {tag}\n")
        refused(["fit", "--config", "tagged.yaml"], capsys)
        refused(["plan", "--config", "tagged.yaml"], capsys)
        refused(["verify", "DPOModule", "--model.beta", tag], capsys)


@pytest.mark.parametrize(
    "settings",
    [
        {"engine": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", RAN]}}},
        {"scorer": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", RAN]}}},
        {"scorer": "os.system"},
    ],
)
def test_classes_that_are_neither_scorer_nor_engine_are_not_instantiated(
    settings: dict[str, Any], policy_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"init_from": policy_folder, "scorer": "RepetitionPenalty", "max_new_tokens": 2, **settings}
    Path("rows.jsonl").write_text('{"prompt": "a"}\n' * 4)
    config = {
        "model": {"class_path": "GRPOModule", "init_args": arguments},
        "data": {"class_path": "PromptDataModule", "init_args": {"source": "rows.jsonl", "samples_per_prompt": 2,
                                                                 "batch_size": 4}},
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(config))
    refused(["fit", "--config", "config.yaml"], capsys)


@pytest.mark.parametrize(
    "name", ["../outside", "/outside", "a/../../b", "a\0b", "a\nb", "linked/a", "linked", "~/a", "."]
)
def test_run_names_outside_the_runs_folder_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs").mkdir()
    Path("away").mkdir()
    Path("runs/linked").symlink_to(Path("away").absolute())
    refused(["fit", *BASIC, "--run_name", name], capsys)
    assert not list(Path("away").iterdir()) and not Path("outside").exists()
    assert [path.name for path in Path("runs").iterdir()] == ["linked"]


def test_the_runs_folder_may_be_a_symlink() -> None:
    Path("big_disk").mkdir()
    Path("runs").symlink_to("big_disk")
    assert rlhf(["fit", *BASIC]) == 0 and (Path("big_disk") / "slope" / "version_0" / "model").is_dir()


def test_exported_weights_are_safetensors(policy_folder: str) -> None:
    assert rlhf(fit_on(policy_folder)) == 0
    written = {path.suffix for path in Path("runs/sft/version_0/model").iterdir()}
    assert ".safetensors" in written and not written & {".bin", ".pt", ".pkl"}
    save_file({"x": torch.ones(1)}, "x.safetensors")
