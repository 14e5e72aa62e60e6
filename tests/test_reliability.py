"""Run the drills of experiments/reliability in small: killed and torn runs end with bit-identical results."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "reliability"
STAGES = ("sft", "reward", "dpo", "kto", "ppo", "grpo", "episodes")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return the drill's module, and its world in a folder."""
    sys.path.insert(0, str(FOLDER))
    import drill
    from world import make_world

    drill.WORLD = make_world(tmp_path_factory.mktemp("world"))
    yield drill
    sys.path.remove(str(FOLDER))


@pytest.fixture
def drilled(drill: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a drill and asserts that nothing was lost."""

    def run(name: str, strategy: str, lora: bool, kills: int, further: bool = True) -> dict[str, Any]:
        record = drill.Drill(name, strategy, lora, tmp_path, drill.WORLD).run(kills, further)
        assert record["lost"] == []
        assert sum(record["counts"].values()) >= kills
        return record

    return run


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_resumes_bit_identically(drilled: Any, name: str) -> None:
    drilled(name, "single", lora=name in ("dpo", "grpo"), kills=2, further=name == "sft")


@pytest.mark.parametrize(("name", "strategy", "lora"), [("sft", "ddp", True), ("ppo", "fsdp2", False)])
def test_a_killed_run_on_two_ranks_resumes_bit_identically(drilled: Any, name: str, strategy: str, lora: bool) -> None:
    drilled(name, strategy, lora, kills=1, further=False)


@pytest.mark.drill
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_runs_on_two_ranks_are_deterministic(drill: Any, tmp_path: Path, strategy: str) -> None:
    subject = drill.Drill("dpo", strategy, True, tmp_path, drill.WORLD)
    assert drill.differences(subject.whole("one"), subject.whole("two")) == []


@pytest.mark.drill
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("name", STAGES)
def test_the_full_kill_drill(drilled: Any, name: str, strategy: str, lora: bool) -> None:
    record = drilled(name, strategy, lora, kills=20)
    assert {"torn", "terminated", "disk full"} <= set(record["counts"])


def test_the_comparison_detects_a_different_seed(drill: Any, tmp_path: Path) -> None:
    """The comparison can fail: a different sampling seed gives a different run."""
    subject = drill.Drill("sft", "single", False, tmp_path, drill.WORLD)
    whole = subject.whole("one")
    subject.argv += ["--samples.seed", "1", "--model.betas", "[0.9, 0.998]"]
    found = " ".join(drill.differences(whole, subject.whole("two")))
    assert "checkpoint.state_dict" in found and "model" in found and "TensorBoard" in found and "samples" in found


def test_the_page_has_a_row_for_each_drill(drill: Any, tmp_path: Path) -> None:
    record = {"module": "ppo", "strategy": "ddp", "lora": True, "counts": {"killed: saving": 3, "torn": 1}, "lost": []}
    (tmp_path / "kills_ppo_ddp_lora.json").write_text(json.dumps(record))
    drill.render(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| ppo | ddp | LoRA | 0 | 0 | 0 | 3 | 0 | 0 | 0 | 0 | 1 | nothing |" in page


@pytest.mark.parametrize("front", ["page", "files", "processes", "servers", "numbers"])
def test_probe_names_are_unique_and_ci_runs_a_sample(front: str, drill: Any) -> None:
    import probes

    names = [probe.name for probe in probes.FRONTS[front]()]
    assert len(set(names)) == len(names) > probes.IN_CI[front] == len(probes.spread(names, probes.IN_CI[front]))


def test_a_probe_classifies_command_output(tmp_path: Path, drill: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It detects planted code, tracebacks, hangs and false success, and accepts a one-sentence error."""
    import probing

    monkeypatch.setattr(probing, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(probing, "SECONDS", 1)
    world = tmp_path / "world"
    world.mkdir()

    def spin() -> int:
        while True:
            pass

    outcomes = {
        "planted code ran": lambda: (Path("ran").touch(), 1)[1],
        "status 0": lambda: 0,
        "traceback": lambda: {}["x"],
        "status 7": lambda: 7,
        "late": lambda: time.sleep(60) or 0,
        "late, busy": spin,
        None: lambda: print("rlhf: it is one sentence") or 1,
    }
    for expected, work in outcomes.items():
        found = probing.run_probe(probing.Probe("files", "x", work), world)
        assert found.broke == (expected and expected.partition(",")[0]), found


def test_the_page_lists_failed_probes(tmp_path: Path, drill: Any) -> None:
    import page

    record = {"total": 9, "note": "A note.", "fronts": {"page": {"held": 3, "broke": 1}}, "broken": []}
    (tmp_path / "probes_all.json").write_text(json.dumps(record))
    page.render(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "4 of 9 probes. A note." in text and "| page | 3 | 1 |" in text
