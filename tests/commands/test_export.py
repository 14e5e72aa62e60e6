"""Test `rlhf export`: the exported folder gives the same outputs as the checkpoint."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from commands.conftest import save
from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.export import probe, trained
from rlhf_lightning.commands.train import run
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import LoadSettings
from rlhf_lightning.models.resolving import resolve_folder
from rlhf_lightning.models.roles import load_policy
from rlhf_lightning.tokenization import encode_prompt, load_tokenizer

ROWS = [{"prompt": f"question {n}", "completion": f"answer {n} " + "x" * n} for n in range(12)]
PAIRS = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": "bad"} for n in range(12)]
IDS = torch.arange(7, 40).unsqueeze(0)


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", "cache")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))


def fit(stage, folder, *flags):
    """Train a few updates; return the run's folder."""
    kind, source = {"SFT": ("SFT", "rows"), "Reward": ("Preference", "pairs"), "DPO": ("Preference", "pairs")}[stage]
    return run(
        ["fit", "--model", f"{stage}Module", "--model.init_from", folder, "--data", f"{kind}DataModule",
         "--data.source", f"{source}.jsonl", "--data.batch_size", "4", "--model.learning_rate", "1e-2", *flags]
    ).folder  # fmt: skip


def outputs(folder, kind):
    with torch.no_grad():
        return kind.from_pretrained(folder).eval()(IDS).logits


def test_exporting_a_checkpoint_equals_the_runs_own_export(policy_folder, data, capsys):
    folder = fit("SFT", policy_folder)
    assert rlhf(["export", str(folder), "--out", "exported"]) == 0
    assert "checkpoints/last.ckpt -> exported" in capsys.readouterr().out
    expected = outputs(folder / "model", AutoModelForCausalLM)
    assert torch.equal(outputs("exported", AutoModelForCausalLM), expected)
    assert not torch.allclose(outputs(policy_folder, AutoModelForCausalLM), expected, atol=1e-2), "training changed it"


def test_exporting_an_earlier_checkpoint_gives_its_weights(policy_folder, data):
    folder = fit("SFT", policy_folder, "--checkpoint.every_n_updates", "1", "--checkpoint.keep_last", "null")
    assert rlhf(["export", str(folder / "checkpoints" / "update_000001.ckpt"), "--out", "first"]) == 0
    assert not torch.allclose(
        outputs("first", AutoModelForCausalLM), outputs(folder / "model", AutoModelForCausalLM), atol=1e-3
    )


def test_the_best_checkpoint_can_be_exported(policy_folder, data, capsys):
    folder = fit("SFT", policy_folder)
    assert rlhf(["export", str(folder), "--best", "--out", "best"]) == 1
    assert "has no best checkpoint, since it was not validated" in capsys.readouterr().err
    validated = fit("SFT", policy_folder, "--data.eval_rows", "4", "--run_name", "validated")
    assert rlhf(["export", "runs/validated", "--out", "best", "--best"]) == 0
    assert torch.equal(outputs("best", AutoModelForCausalLM), outputs(validated / "model", AutoModelForCausalLM))


def test_exporting_dpo_loads_no_reference(policy_folder, data, monkeypatch):
    folder = fit("DPO", policy_folder)
    monkeypatch.setattr("rlhf_lightning.models.frozen.load_reference", None)
    assert rlhf(["export", str(folder), "--out", "exported"]) == 0
    assert torch.equal(outputs("exported", AutoModelForCausalLM), outputs(folder / "model", AutoModelForCausalLM))


@pytest.mark.parametrize(
    ("stage", "kind"), [("SFT", AutoModelForCausalLM), ("Reward", AutoModelForSequenceClassification)]
)
def test_merging_an_adapter_keeps_the_outputs_and_prints_the_difference(policy_folder, data, stage, kind, capsys):
    folder = fit(stage, policy_folder, "--model.lora.r", "4")
    assert (folder / "model" / "adapter_config.json").is_file()
    for source, out in ((folder / "model", "from_adapter"), (folder, "from_run")):
        assert rlhf(["export", str(source), "--out", out, "--merge"]) == 0
        told = capsys.readouterr().out
        gap = float(re.search(r"unmerged adapter: ([\d.e+-]+)", told).group(1))
        changes = {} if stage == "SFT" else {"num_labels": 1}
        base = kind.from_pretrained(policy_folder, **changes)
        with torch.no_grad():
            adapted = PeftModel.from_pretrained(base, folder / "model").eval()(IDS).logits
        difference = (outputs(out, kind) - adapted).abs().max()
        assert difference < 1e-4 and gap < 1e-4
        assert not Path(out, "adapter_config.json").exists()
        kept = folder / "model" if source == folder / "model" else Path(f"{out}.adapter")
        assert f"the adapter is in {kept}" in told
        assert (kept / "adapter_model.safetensors").is_file()
    assert [path.name for path in Path().glob("*.adapter")] == ["from_run.adapter"]


def test_a_qlora_adapter_is_merged_into_full_precision_and_the_difference_printed(policy_folder, data, capsys):
    folder = fit("SFT", policy_folder, "--model.lora.r", "4", "--model.quantization", "nf4")
    assert rlhf(["export", str(folder), "--out", "merged", "--merge", "true"]) == 0
    told = capsys.readouterr().out
    gap = float(re.search(r"unmerged adapter: ([\d.e+-]+)", told).group(1))
    stored = json.loads((folder / "model" / "backbone.json").read_text())
    assert stored["quantization"] == "nf4" and json.loads(Path("merged/config.json").read_text())
    assert "quantization_config" not in Path("merged/config.json").read_text()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy_folder), folder / "model").eval()
    four_bits = trained(folder / "model", AutoModelForCausalLM, "nf4", {})
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)
    assert gap == pytest.approx(float((probe(four_bits) - probe(merged)).abs().max()), rel=1e-2)
    assert gap > 1e-2, "four bits are not full precision"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (Path("merged.adapter") / name).read_bytes()
    assert rlhf(["export", str(folder), "--out", "again", "--merge", "true"]) == 0
    Path("taken.adapter").mkdir()
    assert rlhf(["export", str(folder), "--out", "taken", "--merge", "true"]) == 1
    assert "the adapter's folder taken.adapter exists already" in capsys.readouterr().err


def test_an_adapter_of_another_backbone_is_refused(policy_folder, data, capsys, tmp_path):
    folder = fit("SFT", policy_folder, "--model.lora.r", "4")
    config = folder / "model" / "adapter_config.json"
    changed = json.loads(config.read_text()) | {
        "base_model_name_or_path": save(tmp_path / "other", LlamaForCausalLM, seed=9)
    }
    config.write_text(json.dumps(changed))
    assert rlhf(["export", str(folder / "model"), "--out", "merged", "--merge"]) == 1
    assert "was trained on another backbone" in capsys.readouterr().err


def test_an_adapter_saved_by_peft_is_merged(policy_folder):
    """Without backbone.json only the path of the backbone is known."""
    base = AutoModelForCausalLM.from_pretrained(policy_folder)
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    model.save_pretrained("adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("adapter", name).write_bytes(Path(policy_folder, name).read_bytes())
    assert rlhf(["export", "adapter", "--out", "merged", "--merge"]) == 0
    with torch.no_grad():
        assert torch.allclose(outputs("merged", AutoModelForCausalLM), model.eval()(IDS).logits, atol=1e-5)


def test_a_user_class_is_imported_for_export(policy_folder, data, monkeypatch, capsys):
    Path("elsewhere").mkdir()
    Path("elsewhere/own_stage.py").write_text(
        "from rlhf_lightning.modules import SFTModule\n\n\nclass OwnModule(SFTModule):\n    '''SFT again.'''\n"
    )
    with monkeypatch.context() as patched:
        patched.syspath_prepend("elsewhere")
        trained = run(
            ["fit", "--model", "own_stage.OwnModule", "--model.init_from", policy_folder, "--data", "SFTDataModule",
             "--data.source", "rows.jsonl", "--data.batch_size", "6"]
        ).folder  # fmt: skip
    monkeypatch.delitem(__import__("sys").modules, "own_stage")
    assert rlhf(["export", str(trained), "--out", "exported"]) == 1
    assert "was written by own_stage.OwnModule: add --import own_stage" in capsys.readouterr().err
    assert rlhf(["export", str(trained), "--out", "exported", "--import", "elsewhere/own_stage.py"]) == 0
    assert torch.equal(outputs("exported", AutoModelForCausalLM), outputs(trained / "model", AutoModelForCausalLM))


def test_invalid_exports_are_refused(policy_folder, trained, capsys):
    Path("taken").mkdir()
    torch.save({"state_dict": {}}, "foreign.ckpt")
    torch.save({"hyper_parameters": {"_class_path": "collections.OrderedDict"}}, "class.ckpt")
    Path("text.ckpt").write_text("no checkpoint")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    for source, out, sentence in (
        ("runs/slope", "taken", "taken exists already"),
        ("absent.ckpt", "out", "there is no checkpoint absent.ckpt"),
        ("runs/absent", "out", "no run found at"),
        (policy_folder, "out", "is already a Hugging Face folder"),
        ("adapter", "out", "is already an adapter folder; --merge merges it"),
        ("foreign.ckpt", "out", "does not name the class that wrote it"),
        ("class.ckpt", "out", "was written by collections.OrderedDict: add --import"),
        ("text.ckpt", "out", "settings: it is damaged, or not a .ckpt file of a run"),
    ):
        assert rlhf(["export", source, "--out", out]) == 1, source
        told = capsys.readouterr().err
        assert sentence in told and "Traceback" not in told
        assert not Path("out").exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"hyper_parameters": {"_class_path": "tiny_run.SlopeModule", "slope": Bomb()}}, "bomb.ckpt")
    assert rlhf(["export", "bomb.ckpt", "--out", "out"]) == 1
    assert not (tmp_path / "exploded").exists()


@pytest.fixture
def hub(monkeypatch):
    """Serve the Hub's upload API: create repositories, accept every file inline, and record the commits."""
    kept = {"created": [], "files": {}}

    class Api(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path == "/api/repos/create":
                kept["created"].append(json.loads(body))
                answer = {"url": f"http://{self.headers['Host']}/me/tuned", "name": "me/tuned"}
            elif self.path.startswith("/api/validate-yaml"):
                answer = {"errors": [], "warnings": []}
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            else:
                assert self.path == "/api/models/me/tuned/commit/main"
                for line in body.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        kept["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                answer = {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/me/tuned/commit/0",
                }
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield kept
    server.shutdown()
    server.server_close()


def is_private(created):
    """Return whether a private repository was requested; the field's name depends on the huggingface_hub version."""
    return created.get("private", False) or created.get("visibility") == "private"


def test_a_pushed_run_has_a_model_card_with_its_provenance(policy_folder, data, hub, capsys, tmp_path):
    folder = fit("DPO", policy_folder)
    Path("report.md").write_text("# Evaluation of policies\n\n## Models\n\n| a |\n\n![curve](curve.png)\n")
    pushed = ["export", str(folder), "--out", "tuned", "--push", "me/tuned", "--results", "report.md"]
    assert rlhf(pushed) == 0, capsys.readouterr().err
    assert hub["created"][0]["name"] == "tuned" and is_private(hub["created"][0])
    assert "tuned -> http" in capsys.readouterr().out
    here = {file.name: file.read_bytes() for file in Path("tuned").iterdir()}
    assert hub["files"] == here and {"model.safetensors", "tokenizer.json", "README.md"} <= here.keys()
    card, manifest = here["README.md"].decode(), json.loads((folder / "manifest.json").read_text())
    assert "DPOModule" in card and manifest["data"]["fingerprint"] in card and "read 12, kept 12" in card
    assert re.search(r"model.beta +\| 0.1", card) and f"torch {torch.__version__}" in card
    assert "## Evaluation of policies" in card and "### Models" in card and "curve.png" not in card
    assert not [name for name, content in here.items() if str(tmp_path).encode() in content], "a path is published"
    assert rlhf(["export", "tuned", "--push", "me/tuned", "--public", "--results", "report.md"]) == 0
    assert not is_private(hub["created"][1])
    again = hub["files"]["README.md"].decode()
    assert again.count("## How it was trained") == again.count("### Models") == 1 and "DPOModule" in again


def test_invalid_push_arguments_are_refused(policy_folder, data, hub, capsys, monkeypatch):
    folder = fit("SFT", policy_folder)
    for flags, words in (
        (["--public", "--out", "x"], "public is set, but no repository is given"),
        (["--push", "me/tuned"], "name the folder to write with --out"),
        (["--push", "me/tuned", "--out", "x", "--results", "none.md"], "there is no report none.md"),
    ):
        assert rlhf(["export", str(folder), *flags]) == 1
        assert words in capsys.readouterr().err and not Path("x").exists()
    assert rlhf(["export", str(folder / "model"), "--push", "not a name"]) == 1
    assert "not a name was not pushed" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert rlhf(["export", str(folder / "model"), "--push", "me/tuned"]) == 1
    assert "check name, network and `hf auth login`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("RLHF_LLAMA_CPP"), reason="RLHF_LLAMA_CPP names no folder with llama.cpp's convert_hf_to_gguf.py"
)
def test_an_exported_folder_survives_a_gguf_round_trip(smollm2, tmp_path):
    policy = load_policy(smollm2.name_or_path, LoadSettings(self_check=False))
    folder, file = export_policy(policy, smollm2, tmp_path / "exported"), tmp_path / "policy.gguf"
    root = Path(os.environ["RLHF_LLAMA_CPP"])
    paths = f"{root / 'gguf-py'}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, str(root / "convert_hf_to_gguf.py"), str(folder), "--outfile", str(file)]
    subprocess.run([*command, "--outtype", "f32"], check=True, env={**os.environ, "PYTHONPATH": paths})
    again, tokenizer = load_policy(str(file), LoadSettings(self_check=False)), load_tokenizer(resolve_folder(str(file)))
    ids = torch.tensor([encode_prompt(smollm2, [{"role": "user", "content": "How do I start with chess?"}])])
    assert encode_prompt(tokenizer, [{"role": "user", "content": "How do I start with chess?"}]) == ids[0].tolist()
    with torch.no_grad():
        assert torch.allclose(policy.model(ids).logits, again.model(ids).logits, atol=1e-5)
