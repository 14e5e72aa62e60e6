"""Test the scripts that measure a GPU, rollouts, data and long contexts, on tiny models."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_lightning.sampling import generate_engine, slot_engine

sys.path.append(str(Path(__file__).resolve().parents[1] / "experiments" / "benchmarks"))
import data_speed
import gpu_report
import long_context
import results
import rollouts
import vllm_rollouts
from cases import LIMIT, PEER


def test_every_gpu_report_cell_is_a_case_on_both_devices():
    for device, smoke in (("gpu", False), ("cpu", True)):
        found = gpu_report.cells(device, smoke)
        assert len(found) == len(gpu_report.CELLS)
        assert next(iter(found)).startswith("sft_lora, 0.6B, 4096")
        for case in found.values():
            steps = int(case.flags[case.flags.index("--steps") + 1])
            assert len(range(steps)[case.goals[0].steps]) >= 2 and PEER not in case.sides
    assert PEER in next(iter(gpu_report.cells("gpu", False, has_peer=True).values())).sides


def test_a_gpu_report_cell_shows_tokens_per_second_and_its_share_of_the_plain_loop():
    case = next(iter(gpu_report.cells("gpu", False).values()))
    memory = {"peak_rss_gb": 1.0}
    ours = memory | {"seconds": [9, 9, 2, 2, 2, 2], "tokens": [10, 20, 60, 100, 140, 180]}
    plain = memory | {"seconds": [9, 1, 1, 1, 1, 1], "tokens": [10, 50, 90, 130, 170, 210], "shared_prompt": False}
    found = results.findings(case, case.goals[0], {"ours": [ours], LIMIT: [plain]})
    assert found["ours"].value == pytest.approx(20) and found["share"].value == pytest.approx(0.5)


def test_the_gpu_report_names_cells_that_have_not_run(tmp_path, monkeypatch):
    arguments = ["--device", "cpu", "--smoke", "--seconds", "0", "--runs", str(tmp_path), "--out"]
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments, str(tmp_path / "page.md")])
    gpu_report.main()
    page = (tmp_path / "page.md").read_text()
    assert all(f"- {name}: " in page.partition("## Missing")[2] for name in gpu_report.cells("cpu", True))
    assert "Nothing has run yet." in page


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_report") / "tiny"
    gpu_report.write_folder(folder, "tiny", 12)
    return folder


def printed(main, monkeypatch, capsys, *arguments):
    """Return the figures that a script prints when its ``main`` runs in this process."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("}")]
    return json.loads(line[line.index("{") :])


def test_the_rollouts_cell_has_vllm_where_it_is_installed(tmp_path, monkeypatch, capsys):
    case = next(case for case in gpu_report.cells("gpu", False, has_vllm=True).values() if case.stage == "rollouts")
    assert case.sides[-1] == gpu_report.VLLM and len(case.goals) == len(gpu_report.ENGINES) + 1

    class Stub:
        def __init__(self, model, **settings):
            assert settings["max_model_len"] == 16 + 2 + 5

        def generate(self, prompts, settings, use_tqdm):
            assert [len(prompt["prompt_token_ids"]) for prompt in prompts] == [16, 17]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * settings["max_tokens"])])] * len(prompts)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Stub, SamplingParams=dict))
    asked = ["--model", tmp_path, "--batch", 2, "--length", 5, "--steps", 3]
    found = printed(vllm_rollouts.main, monkeypatch, capsys, *asked)
    assert found["tokens"] == [10, 20, 30] and len(found["seconds"]) == 3


@pytest.mark.parametrize("engine", gpu_report.ENGINES.values(), ids=gpu_report.ENGINES)
def test_a_rollouts_cell_measures_an_engine(engine, tiny_folder, monkeypatch, capsys):
    asked = ["--device", "cpu", "--sample", tiny_folder, "--engine", engine]
    found = printed(gpu_report.main, monkeypatch, capsys, *asked, "--batch", 3, "--length", 4, "--steps", 2)
    assert len(found["seconds"]) == 2 and 6 < found["tokens"][-1] <= 24 and found["batch"] == 3


def test_the_plain_loop_of_a_cell_measures_every_step(tiny_folder, monkeypatch, capsys):
    asked = ["--device", "cpu", "--bare", tiny_folder, "--batch", 2, "--length", 8, "--steps", 3, "--lora"]
    found = printed(gpu_report.main, monkeypatch, capsys, *asked)
    assert len(found["seconds"]) == 3 and found["tokens"] == [16, 32, 48] and found["peak_rss_gb"] > 0.1


def test_engines_sample_the_same_episodes_of_geometric_lengths(tiny_folder, monkeypatch, capsys):
    for module in (slot_engine, generate_engine):
        monkeypatch.setattr(module, "draw", module.draw)  # the script replaces them
    asked = ["--model", tiny_folder, "--prompts", 8, "--mean", 3, "--cap", 12, "--turns", 1]
    found = printed(rollouts.main, monkeypatch, capsys, *asked)
    assert found["completions"] == 8 and found["different"] == 0 and 1 <= found["mean_length"] < 12


# -- data and long contexts -------------------------------------------------------------------------------------------


def test_the_cost_of_data_is_measured_from_the_loaded_tokenizer(tiny_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    data_speed.write_rows(rows, "One sentence here. Another sentence there. A third of them.", 40)
    for case in ("encode", "start again", "audit"):
        found = data_speed.measured(case, str(rows), str(tiny_folder), str(tmp_path))
        assert found["seconds"] > 0 and found["cpu_seconds"] > 0
    stored = list(tmp_path.rglob("*/tokens.npy"))
    assert len(stored) == 1  # the second start has read the first one's rows


def test_an_update_on_a_long_row_is_measured():
    found = long_context.measured(64, 1)
    assert found["seconds"] >= 0 and 0 < found["resident_GB"] <= found["peak_GB"]
