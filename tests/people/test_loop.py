"""Test `rlhf loop`: the steps of a round; a loop killed anywhere ends bit-identical to an uninterrupted loop."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import refused
from filelock import FileLock
from forked import forked
from safetensors.torch import load_file
from tiny_run import rows_of, scalars_of

from rlhf_lightning.cli import main as rlhf
from rlhf_lightning.commands.web_server import listen
from rlhf_lightning.data.feedback.database import items_of, judgements_of, reading
from rlhf_lightning.data.feedback.records import Answer, Candidate, Item
from rlhf_lightning.people import loop, loop_steps
from rlhf_lightning.people.handing_out import Policy
from rlhf_lightning.people.labeller import Labeller, Page, PeopleLabeller, Supply
from rlhf_lightning.people.store import FeedbackStore
from rlhf_lightning.recipes import FOLDER
from rlhf_lightning.runs import ModelExport

REWARD = """
model: {class_path: RewardModule, init_args: {learning_rate: 1.0e-2}}
data: {class_path: PreferenceDataModule, init_args: {batch_size: 4}}
checkpoint: {every_n_updates: 1}
"""
DPO = REWARD.replace("RewardModule", "DPOModule")
PPO = """
model: {class_path: PPOModule, init_args: {max_new_tokens: 6, learning_rate: 1.0e-3}}
data: {class_path: PromptDataModule, init_args: {batch_size: 4, rollouts: 2}}
"""


PAIR = (Candidate("a"), Candidate("b"))


def gold(prompt, completion):
    """Score completions by their vowels."""
    return sum(letter in "aeiou" for letter in completion) / 6


class LaterLabeller(Labeller):
    """Prefers the completion that comes later in the alphabet, like an AI labeller that is asked once per pair."""

    def label(self, store, count, more):
        while store.labels() < count:
            asked = store.next("alphabet")
            texts = [asked.item.candidates[place].text for place in asked.shown]
            ranks = (0, 1) if texts[0] > texts[1] else (1, 0)
            store.judge("alphabet", asked.id, f"alphabet-{asked.id:08}", Answer("ranking", ranks))


@pytest.fixture
def flags(policy_folder, monkeypatch, tmp_path):
    """The shortest loop: two rounds of eight labels."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    for name, text in (("reward", REWARD), ("dpo", DPO), ("ppo", PPO)):
        Path(f"{name}.yaml").write_text(text)
    for name, count in (("prompts", 20), ("held_out", 6)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{name} {n}"}) + "\n" for n in range(count)))
    return [
        "loop", "--name", "tiny", "--init-from", policy_folder, "--prompts", "prompts.jsonl",
        "--eval-prompts", "held_out.jsonl", "--reward-config", "reward.yaml", "--policy-config", "dpo.yaml",
        "--labeller", "SimulatedAnnotators", "--labeller.gold_reward", f"{__name__}.gold", "--rounds", "2",
        "--labels", "8", "--gold-reward", f"{__name__}.gold", "--max-new-tokens", "6",
    ]  # fmt: skip


def steps_of(folder):
    """Return everything that must be equal for the same loop: all files except times and the folders named by them."""
    steps = json.loads((folder / "state.json").read_text())["steps"]
    return {
        name: {
            key: value
            for key, value in step.items()
            if key not in ("seconds", "ended", "first", "fingerprint", "model")
        }
        for name, step in steps.items()
    }


def weights_of(folder):
    steps = json.loads((folder / "state.json").read_text())["steps"]
    models = {name: step["model"] for name, step in steps.items() if "model" in step}
    return {name: load_file(Path(model) / "model.safetensors") for name, model in models.items()}


def labels_of(folder):
    with reading(folder / "feedback.db") as connection:
        return [(one.annotator, one.item, one.shown, one.ranks, one.repeat) for one in judgements_of(connection)]


def test_recipes_are_fingerprinted_by_content(flags):
    named = {"prompts": "prompts.jsonl", "eval_prompts": "held_out.jsonl", "policy_config": "dpo.yaml"}
    Path("copy.yaml").write_text((FOLDER / "labels" / "reward.yaml").read_text())
    packaged = loop.fingerprints({**named, "reward_config": "recipe:labels/reward"})
    assert packaged == loop.fingerprints({**named, "reward_config": "copy.yaml"})


def cut(argv, number, holder, name, times):
    """Run a loop that sends itself a signal after a function has returned for the ``times``-th time."""
    left = [times]

    def work():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a test run under nohup, or in the background, ignores them
        signal.signal(signal.SIGINT, signal.default_int_handler)
        original = getattr(holder, name)

        def counted(*args, **kwargs):
            result = original(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return result

        setattr(holder, name, counted)
        return rlhf(argv)

    return forked(work, Path("said.txt"))


KILLS = [
    (loop_steps, "write_lines", 1),  # the first policy was evaluated, but this is not recorded
    (FeedbackStore, "add", 1),
    (FeedbackStore, "judge", 3),
    (FeedbackStore, "next", 4),
    (ModelExport, "on_train_batch_end", 1),  # in the middle of the reward model
    (ModelExport, "on_train_end", 1),  # the output exists, but this is not recorded
    (loop_steps, "write_text", 1),  # between two steps
    (ModelExport, "on_train_batch_end", 2),  # in the middle of the policy
    (loop, "win_rate", 1),
    (loop, "write_report", 1),
    (FeedbackStore, "judge", 2),  # and the second round
    (ModelExport, "on_train_batch_end", 3),
    (ModelExport, "on_train_end", 1),
]


@pytest.mark.parametrize(
    ("holder", "name", "number"),
    [
        (loop_steps, "write_lines", signal.SIGTERM),
        (FeedbackStore, "judge", signal.SIGHUP),
        (FeedbackStore, "judge", signal.SIGINT),
        (ModelExport, "on_train_batch_end", signal.SIGTERM),
    ],
)
def test_a_loop_exits_with_the_signal_status(flags, holder, name, number):
    status, said = cut(flags, number, holder, name, 1)
    training = holder is ModelExport and number == signal.SIGTERM
    assert status == (75 if training else 128 + number) and "Traceback" not in said, said


@pytest.mark.drill
def test_a_loop_killed_at_any_call_resumes_bit_identically(flags):
    flags = [*flags, "--repeats", "0.2", "--select", "uncertainty"]
    assert forked(lambda: rlhf([*flags, "--runs-folder", "whole"]), Path("said.txt"))[0] == 0
    argv = [*flags, "--runs-folder", "cut"]
    for holder, name, times in KILLS:
        status, said = cut(argv, signal.SIGKILL, holder, name, times)
        assert status == -signal.SIGKILL, f"{name} was not called {times} times: {said}"
    status, said = cut(argv, signal.SIGTERM, ModelExport, "on_train_batch_end", 1)
    assert status == 75, f"told to stop: try again; {said}"
    assert cut(argv, signal.SIGKILL, ModelExport, "on_train_end", 1)[0] == -signal.SIGKILL
    status, said = forked(lambda: rlhf(argv), Path("said.txt"))
    assert status == 0, said
    whole, ended = Path("whole/tiny"), Path("cut/tiny")
    assert steps_of(ended) == steps_of(whole)
    assert all(labels_of(ended / f"round_{k}") == labels_of(whole / f"round_{k}") for k in range(2))
    mine, theirs = weights_of(ended), weights_of(whole)
    assert mine.keys() == theirs.keys() and len(mine) == 4
    assert all(torch.equal(mine[name][key], theirs[name][key]) for name in mine for key in mine[name])
    for name in ("start/completions.jsonl", "round_1/completions.jsonl", "loop.md", "loop.png"):
        assert (ended / name).read_bytes() == (whole / name).read_bytes(), name
    assert scalars_of(ended, "loop/gold_reward") == scalars_of(whole, "loop/gold_reward")


def test_a_loop_samples_with_the_flags_of_generate(flags, policy_folder):
    settings = ["--stop-strings", '["a"]', "--engine", "GenerateEngine", "--top-k", "40", "--rounds", "1"]
    assert rlhf([*flags, *settings]) == 0
    folder = Path("runs/loop/tiny")
    with reading(folder / "round_0" / "feedback.db") as connection:
        candidates = [one for item in items_of(connection) for one in item.candidates]
    assert all(one.sampling["top_k"] == 40 for one in candidates)
    texts = [row["completion"] for name in ("start", "round_0") for row in rows_of(folder / name / "completions.jsonl")]
    texts += [one.text for one in candidates]
    assert len(texts) == 2 * 6 + 2 * 10 and not any("a" in text for text in texts)


def test_each_round_trains_on_all_labels_so_far(flags, capsys):
    assert rlhf([*flags, "--rounds", "1"]) == 0
    assert rlhf(flags) == 0, "more rounds go on with it"
    folder = Path("runs/loop/tiny")
    steps = steps_of(folder)
    assert [steps[f"round_{k}/evaluate"]["labels"] for k in range(2)] == [8, 16]
    assert steps["round_0/sample"]["pairs"] == 10, "a quarter more than labels"
    config = (folder / "round_1" / "policy" / "version_0" / "config.yaml").read_text()
    assert "round_0/feedback.db@8" in config and "round_1/feedback.db@8" in config
    first, second = (rows_of(folder / f"round_{k}" / "completions.jsonl") for k in range(2))
    assert [row["prompt"] for row in first] == [f"held_out {n}" for n in range(6)]
    assert all(row["gold_reward"] == pytest.approx(gold("", row["completion"])) for row in second)
    assert [step for step, _ in scalars_of(folder, "loop/gold_reward")] == [0, 8, 16]
    assert "| 16 " in (folder / "loop.md").read_text() and (folder / "loop.png").stat().st_size > 5000
    capsys.readouterr()
    assert rlhf(flags) == 0 and "loop: round" not in capsys.readouterr().out, "nothing is done twice"
    assert rlhf([*flags, "--labels", "9"]) == 1
    assert "was started with labels 8 (now 9): give another --name" in capsys.readouterr().err
    with FileLock(folder / "loop.lock"):
        assert rlhf(flags) == 1
    assert "another process runs the loop" in capsys.readouterr().err


class HastyLabeller(Labeller):
    """Skips all but every third pair."""

    def label(self, store, count, more):
        while store.labels() < count:
            asked = store.next("hasty")
            if asked is None:
                if not more():
                    return
                continue
            answer = Answer("tie") if asked.id % 3 == 0 else Answer("skip")
            store.judge("hasty", asked.id, f"hasty-{asked.id:010}", answer)


def test_skipped_items_are_replaced_by_new_samples(flags, capsys):
    at = flags.index("--labeller")
    flags = [*flags[:at], "--labeller", f"{__name__}.HastyLabeller", *flags[at + 4 :], "--rounds", "1"]
    assert rlhf([*flags, "--name", "more"]) == 0
    folder = Path("runs/loop/more")
    assert steps_of(folder)["round_0/label"]["labels"] == 8
    with reading(folder / "round_0" / "feedback.db") as connection:
        items = list(items_of(connection))
    assert len(items) > 24 and len({item.key for item in items}) == len(items)
    places = [(item.candidates[0].seed, item.candidates[0].episode) for item in items]
    assert places == sorted(set(places)), "sampling continues where it stopped, also after the last prompt"
    assert "further pairs; 3 of 8 labels are collected" in capsys.readouterr().out


def test_a_round_without_further_pairs_continues_with_fewer_labels(flags, monkeypatch, capsys):
    at = flags.index("--labeller")
    flags = [*flags[:at], "--labeller", f"{__name__}.HastyLabeller", *flags[at + 4 :], "--rounds", "1"]
    monkeypatch.setattr(loop.Loop, "_more", lambda *_: False)
    assert rlhf(flags) == 0
    assert "round 0 has 3 of 8 labels and continues" in capsys.readouterr().out
    assert steps_of(Path("runs/loop/tiny"))["round_0/evaluate"]["labels"] == 3


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "5", "{}", '{"steps": []}', '{"steps": {"a": 1}, "settings": {}, "files": {}}']
)
def test_a_damaged_state_file_is_refused(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with refused("damaged-state", "give another --name"):
        loop.LoopState(tmp_path, {}, {})


def test_resuming_with_edited_files_is_refused(tmp_path):
    """Files are compared by content; a comment changes nothing."""
    settings = {}
    for name in loop_steps.FILES:
        settings[name] = str(tmp_path / f"{name}.{'yaml' if 'config' in name else 'jsonl'}")
        Path(settings[name]).write_text("a: 1\nb: 2\n")
    begun = loop.LoopState(tmp_path, settings, loop.fingerprints(settings))
    begun.step("first", dict)
    Path(settings["reward_config"]).write_text("# the same\nb: 2\na: 1\n")
    again = loop.LoopState(tmp_path, settings, loop.fingerprints(settings))
    assert "first" in again.steps
    for name, held in (("reward_config", "a: 1\nb: 3\n"), ("prompts", "a: 1\nb: 2\n\n")):
        before = Path(settings[name]).read_text()
        Path(settings[name]).write_text(held)
        with refused("files-changed", f"{Path(settings[name]).name} changed since the loop", "give another --name"):
            loop.LoopState(tmp_path, settings, loop.fingerprints(settings))
        Path(settings[name]).write_text(before)


def test_a_loop_with_ppo_and_an_ensemble_needs_no_gold_reward(flags, policy_folder):
    """Use a custom labeller, PPO, and two reward models for selection; each round starts from the previous one."""
    at = flags.index("--labeller")
    flags = [*flags[:at], "--labeller", f"{__name__}.LaterLabeller", *flags[at + 4 : -4], *flags[-2:]]
    more = ["--policy-config", "ppo.yaml", "--members", "2", "--select", "disagreement", "--start", "latest"]
    assert rlhf([*flags, *more]) == 0
    folder = Path("runs/loop/tiny")
    steps = steps_of(folder)
    found = steps["round_1/evaluate"]
    assert 0 <= found["win_rate"] <= 1 and "gold_reward" not in found and "score" in found
    weights = weights_of(folder)
    assert {name for name in weights if "reward" in name} == {f"round_{k}/reward_{m}" for k in (0, 1) for m in (0, 1)}
    head = [weights[f"round_0/reward_{m}"]["score.weight"] for m in (0, 1)]
    assert not torch.equal(*head), "members have seeds of their own"
    config = (folder / "round_1" / "policy" / "version_0" / "config.yaml").read_text()
    assert f"init_from: {folder}/round_0/policy/version_0/model" in config and "Ensemble" in config
    assert {one[0] for one in labels_of(folder / "round_1")} == {"alphabet"}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--pool", "4"], "it must be 8 or more"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--select", "disagreement"], "members is 1: set it to 2 or more"),
        (["--select", "uncertainy"], "did you mean uncertainty?"),
        (["--gold-reward", "absent.gold"], "gold_reward 'absent.gold' cannot be imported"),
        (["--labels", "0"], "labels is 0"),
        (["--prompts", "absent.jsonl"], "there is no file absent.jsonl"),
        (["--name", "../out"], "run_name is '../out'"),
    ],
)
def test_invalid_settings_are_refused(flags, more, sentence, capsys):
    assert rlhf([*flags, *more]) == 1
    assert sentence in capsys.readouterr().err


def test_flags_override_the_config_file(flags, capsys):
    Path("loop.yaml").write_text("name: other\npool: 4\nlabels: 20\n")
    assert rlhf(["loop", "--config", "loop.yaml", *flags[1:]]) == 1
    assert "pool is 4: it must be 8 or more, because each pair takes 1 of the 8 labels" in capsys.readouterr().err
    assert rlhf(["loop", "--config", "loop.yaml", "--labells", "3"]) == 2
    assert "the nearest is --labels" in capsys.readouterr().err


def test_the_loop_waits_for_human_labels(tmp_path, capsys):
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    store = FeedbackStore(tmp_path / "f.db", Policy(repeats=0.0))
    store.add([Item(f"q {n}", (Candidate("a"), Candidate("b"))) for n in range(4)])

    def work():
        page = Page(f"http://127.0.0.1:{port}")
        page.enter("ann")
        shown.append(page._send("/", None)[1])
        for n in range(3):
            asked = page.ask("/api/item")["item"]
            verdict = {"verdict": "skip"} if n == 0 else {"verdict": "ranking", "ranks": [0, 1]}
            place = {"store": asked["store"], "assignment": asked["assignment"]}
            page.ask("/api/judgements", {"key": f"a key of its own {n}", **place, **verdict})
        page.close()

    shown = []
    guide = tmp_path / "guide.md"
    guide.write_text("Look for **help**")
    person = threading.Thread(target=work)
    person.start()
    PeopleLabeller(port=port, instructions=str(guide)).label(store, 2, lambda: False)
    person.join()
    assert store.labels() == 2 and "label at http://127.0.0.1" in capsys.readouterr().out
    assert "Look for <strong>help</strong>" in shown[0]
    store.close()


def skipper(port, skips, count):
    """An annotator, in a thread, who skips the given number of pairs and then judges."""

    def work():
        page = Page(f"http://127.0.0.1:{port}")
        page.enter("ann")
        done = 0
        while done < skips + count:
            told = page.ask("/api/item")
            if told["item"] is None:
                if not told["state"]:
                    break
                time.sleep(0.05)
                continue
            verdict = {"verdict": "skip"} if done < skips else {"verdict": "tie"}
            done += 1
            place = {"store": told["item"]["store"], "assignment": told["item"]["assignment"]}
            page.ask("/api/judgements", {"key": f"a key of its own {skips} {done}", **place, **verdict})
        page.close()

    made = threading.Thread(target=work)
    made.start()
    return made


def test_annotators_who_skip_everything_get_more_items(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_lightning.people.labeller.PAUSE", 0.05)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    asked = []

    def more():
        asked.append(store.labels())
        first = 4 * len(asked)
        return len(asked) < 3 and store.add(Item(f"q {n}", PAIR) for n in range(first, first + 4)) > 0

    with FeedbackStore(tmp_path / "f.db", Policy(repeats=0.0)) as store:
        store.add(Item(f"q {n}", PAIR) for n in range(4))
        person = skipper(port, 6, 3)
        PeopleLabeller(port=port).label(store, 3, more)
        person.join()
        assert store.labels() == 3 and len(asked) == 2, "once when all four were skipped, once for the third label"
        person = skipper(port, 20, 1)
        PeopleLabeller(port=port).label(store, 20, more)
        person.join()
        assert store.labels() < 20 and len(asked) == 3, "nothing is left to label, and the loop does not wait"


def test_a_port_in_use_is_refused_before_sampling(flags, capsys):
    at = flags.index("--labeller")
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        flags = [*flags[:at], "--labeller", "PeopleLabeller", "--labeller.port", port, *flags[at + 4 :]]
        assert rlhf(flags) == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert not list(Path("runs").rglob("*.db")) and not list(Path("runs").rglob("completions.jsonl"))


def test_the_page_shows_the_labels_left_in_the_round(tmp_path):
    """The page shows the labels that the round needs, for any number of sampled pairs; then it announces another
    round.
    """
    with FeedbackStore(tmp_path / "f.db", Policy(repeats=0.0)) as store:
        store.add(Item(f"q {n}", PAIR) for n in range(9))
        supply = Supply(store, 2, lambda: False)
        assert supply.left(9) == 2 and supply.state() == "The next completions are being written."
        for n in range(2):
            asked = store.next("ann")
            store.judge("ann", asked.id, f"a key of its own {n}", Answer("tie"))
        assert supply.left(7) == 0 and "has all its labels" in supply.state()


def test_a_public_host_without_annotators_is_refused_before_sampling(flags, capsys):
    at = flags.index("--labeller")
    flags = [*flags[:at], "--labeller", "PeopleLabeller", "--labeller.host", "0.0.0.0", *flags[at + 4 :]]
    assert rlhf(flags) != 0
    assert "name the annotators (annotators ann,bob)" in capsys.readouterr().err
    assert not Path("runs").exists()
