"""`rlhf verify`: every shipped objective passes, and the intended check catches every wrong objective."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import right_blind_objectives  # noqa: F401 - adds its own
import right_recent_objectives  # noqa: F401 - adds its own
import torch
import torch.nn.functional as F
import wrong_blind_objectives
import wrong_distillation_objectives
import wrong_further_objectives
import wrong_objectives
import wrong_online_objectives  # noqa: F401 - adds its own
import wrong_process_objectives
import wrong_subtle_objectives
import wrong_unseen_objectives
from named_mistakes import WORDS
from right_objectives import RIGHT

from rlhf_lightning import cli
from rlhf_lightning.commands.objectives import objective_classes
from rlhf_lightning.modules import DPOModule, GKDModule, NashMDModule, OnlineDPOModule, PPOModule
from rlhf_lightning.types import PreferenceLogprobs
from rlhf_lightning.verification.cases import some_rows
from rlhf_lightning.verification.contract import twin_of, verify, world_and_folder
from rlhf_lightning.verification.distillation_checks import sample_checks
from rlhf_lightning.verification.online_checks import drawing_check, opponent_check
from rlhf_lightning.verification.subject import Subject, at_least

SHIPPED = objective_classes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", RIGHT, ids=lambda kind: kind.__name__)
def test_every_right_objective_passes(kind):
    found = verify(kind)
    assert found.held, [check for check in found.checks if not (check.held or check.meant)]


@pytest.mark.parametrize("kind", SHIPPED, ids=lambda kind: kind.__name__)
def test_every_shipped_objective_passes(kind, caplog):
    found = verify(kind)
    assert not caplog.messages, "the models that a verification loads and draws are no news"
    assert [check for check in found.checks if not check.held] == []
    assert found.convergence is not None
    assert found.convergence.source, "its target is known from elsewhere"
    assert found.convergence.distance < 1e-3
    assert len(found.checks) >= 10


@pytest.mark.parametrize("kind", wrong_objectives.CAUGHT_BY, ids=lambda kind: kind.__name__)
def test_every_mistake_fails_its_check(kind):
    name = wrong_objectives.CAUGHT_BY[kind]
    found = verify(kind, with_convergence=name in ("convergence", "target", "control"))
    failed = {check.name for check in found.checks if not check.held}
    assert name in failed, failed
    assert all(check.advice for check in found.checks)
    words = named().get(kind.__name__, "")
    said = [*found.mistakes, *(check.advice for check in found.checks if not check.held)]
    assert any(words in one for one in said), said


def named() -> dict[str, str]:
    """Return the words that the reason must contain, by class."""
    return {**WORDS, **{kind.__name__: words for kind, words in wrong_objectives.NAMED.items()}}


def test_two_thirds_of_the_mistakes_are_named():
    every = {kind.__name__ for kind in wrong_objectives.CAUGHT_BY}
    assert len(every) == len(wrong_objectives.CAUGHT_BY) and named().keys() <= every
    assert len(named()) >= 2 * len(every) / 3


@pytest.mark.parametrize(
    ("page", "least"),
    [
        (wrong_distillation_objectives, 12),
        (wrong_process_objectives, 8),
        (wrong_further_objectives, 19),
        (wrong_subtle_objectives, 14),
        (wrong_blind_objectives, 13),
        (wrong_unseen_objectives, 13),
    ],
)
def test_other_families_have_their_own_mistakes(page, least):
    own = [check for kind, check in wrong_objectives.CAUGHT_BY.items() if kind.__module__ == page.__name__]
    assert len(set(own)) >= least


def test_there_are_many_mistakes_of_many_kinds():
    assert len(wrong_objectives.CAUGHT_BY) >= 150
    assert len(set(wrong_objectives.CAUGHT_BY.values())) >= 50


def test_exit_status_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written = tmp_path / "checks.json"
    assert cli.main(["verify", "DPOModule", "--model.beta", "0.7", "--json", str(written)]) == 0
    out = capsys.readouterr().out
    assert "DPOModule: " in out and "all hold" in out and "distance" in out
    record = json.loads(written.read_text())[0]
    assert record["settings"]["beta"] == 0.7 and record["held"] is True
    assert record["convergence"]["target"] == "declared" and record["convergence"]["distance"] < 1e-3
    page = tmp_path / "page.md"
    assert cli.main(["verify", "wrong_objectives.FlippedSign", "DPOModule", "--markdown", str(page)]) == 1
    assert "look for a flipped sign" in capsys.readouterr().out
    assert "| DPOModule " in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["NoSuchModule"], "my_file.NoSuchModule"),
        (["DPO"], "did you mean DPOModule?"),
        (["zzz"], " names resembles it."),
        (["no_such_file.MyModule"], "No module named 'no_such_file'"),
        (["wrong_objectives.NoSuchModule"], "wrong_objectives has no NoSuchModule"),
        (["wrong_objectives.caught_by"], "it must be a subclass of"),
        (["DPOModule", "--model.bta", "1"], "DPOModule has no setting 'bta'; did you mean beta?"),
    ],
)
def test_invalid_arguments_exit_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_rlhf_objectives_lists_every_objective(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    written = tmp_path / "objectives.json"
    assert cli.main(["objectives", "--json", str(written)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(written.read_text())
    assert {row["name"] for row in rows} == {kind.__name__ for kind in SHIPPED}
    assert all(row["paper"] and row["summary"].endswith((".", ":")) and row["needs"] for row in rows)
    assert all(row["name"] in out for row in rows)
    assert cli.main(["objectives", "--name", "SimPOModule"]) == 0
    assert "a gap that the margin must exceed" in capsys.readouterr().out
    assert cli.main(["objectives", "--name", "SimPO"]) == 2
    assert "did you mean SimPOModule?" in capsys.readouterr().err


class OfItsOwnFamily(DPOModule):
    """A family unknown to the contracts, with its own checks and its own population."""

    def expected_loss(self, world, shuffled):
        def loss():
            policy = self.policy.model.model.table.weight.log_softmax(-1)
            prefixes, tokens, mask = world.walks
            logp = torch.where(mask, policy[prefixes, tokens], 0.0).sum(-1)
            rewards = 0 * world.rewards if shuffled else world.rewards
            return (logp.exp() * (logp - world.problem.reference.log() - rewards / self.beta)).sum(-1).mean()

        return loss

    def target_policy(self, problem):
        return torch.softmax(problem.reference.log() + problem.rewards / self.beta, -1)

    @staticmethod
    def contract(subject):
        return [at_least("my check", float(subject.module.beta), 0.1, "beta is too small")]


def test_a_new_family_can_define_its_own_checks():
    found = verify(OfItsOwnFamily)
    assert found.held and [check.name for check in found.checks][0] == "my check"
    assert found.convergence.distance < 1e-3


class AllInLossSum(DPOModule):
    def loss_sum(self, batch, meter):
        pairs = self.preference_logprobs(batch)
        x = self.beta * pairs.margin
        return (-(pairs.target * F.logsigmoid(x) + (1 - pairs.target) * F.logsigmoid(-x)) * pairs.weights).sum()


def test_a_loss_inside_loss_sum_is_noted_and_compared_with_an_equivalent_class():
    found = verify(AllInLossSum)
    assert found.held and "never calls preference_loss" in found.notes[0]


class WithMore(PreferenceLogprobs):
    """A user-defined input: a subclass of a family's tuple."""

    @property
    def gap(self):
        return self.chosen_logratio - self.rejected_logratio


class OwnInput(DPOModule):
    def preference_logprobs(self, batch):
        return WithMore(*super().preference_logprobs(batch))

    def preference_loss(self, pairs):
        return -F.logsigmoid(self.beta * pairs.gap) * pairs.target - F.logsigmoid(-self.beta * pairs.gap) * (
            1 - pairs.target
        )


def test_inputs_of_a_subclass_are_read_like_the_base_class():
    assert verify(OwnInput, with_convergence=False).failed == []


# -- targets and intended failures ------------------------------------------------------------------------------------


class RatedCheaper(DPOModule):
    """The loss of rated pairs is lower by a constant, which changes no gradient: the target is that of DPO."""

    target_of = DPOModule
    means_it = {"rated margin": "a constant"}

    def pair_loss(self, pair):
        return super().pair_loss(pair) - 0.1 * pair.rated_margin


class Unexplained(RatedCheaper):
    means_it = {}


class ElsewhereAtRest(RatedCheaper):
    def pair_loss(self, pair):
        return super().pair_loss(pair) + 0.3 * (self.reward_margin(pair) - 1).square()


class NamesNoCheck(DPOModule):
    means_it = {"gradchek": "a slip"}


class NeedsMore(DPOModule):
    def __init__(self, gap: float, **kwargs):
        super().__init__(beta=0.5, **kwargs)
        self.gap = gap

    def pair_loss(self, pair):
        return -F.logsigmoid(self.reward_margin(pair) - self.gap)


class Raises(DPOModule):
    def pair_loss(self, pair):
        return pair.no_such_field


def words(found, name):
    return next(check for check in found.checks if check.name == name)


def test_intended_deviations_pass_if_the_declared_target_is_reached():
    found = verify(RatedCheaper)
    assert found.held and words(found, "rated margin").meant == "a constant"
    assert found.convergence.source == "declared" and words(found, "convergence").held
    assert not verify(Unexplained).held
    elsewhere = verify(ElsewhereAtRest)
    assert {"rated margin", "convergence"} <= {check.name for check in elsewhere.failed}


class TwiceDPO(DPOModule):
    def pair_loss(self, pair):
        return 2 * super().pair_loss(pair)


def test_a_shipped_class_with_equal_gradient_supplies_the_target():
    world, folder = world_and_folder()
    twin = twin_of(Subject(TwiceDPO, world, folder))
    assert twin is not None and twin[0].kind is DPOModule and twin[1] == pytest.approx(2)
    assert twin_of(Subject(NeedsMore, world, folder, {"gap": 0.5})) is None
    found = verify(TwiceDPO)
    assert found.held and "DPOModule" in found.convergence.source and "2 times" in found.convergence.source


def test_a_class_without_a_target_exits_3(capsys: pytest.CaptureFixture[str]):
    name = f"{__name__}.NeedsMore"
    assert cli.main(["verify", name, "--model.gap", "0.5"]) == 3
    out = capsys.readouterr().out
    assert "all hold, no target" in out and "no_target" in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["NamesNoCheck"], "means_it names 'gradchek'"),
        (["NeedsMore"], "NeedsMore needs 'gap'"),
        (["NeedsMore", "--model.gap", "1", "--model.beta", "1"], "NeedsMore sets beta itself"),
        (["Raises"], "return pair.no_such_field"),
    ],
)
def test_invalid_classes_exit_2_with_a_code(arguments: list[str], code: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["verify", f"{__name__}.{arguments[0]}", *arguments[1:]]) == 2
    assert code in capsys.readouterr().err


def test_an_interrupted_verification_leaves_no_temporary_folder(tmp_path: Path):
    code = (
        "import os, signal, tempfile\n"
        "from rlhf_lightning.verification.contract import world_and_folder\n"
        "world_and_folder()\n"
        "print(os.listdir(tempfile.gettempdir()))\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "rlhf_verify_" in done.stdout and "KeyboardInterrupt" in done.stderr
    assert not list(tmp_path.iterdir())


def test_statistical_checks_report_their_power():
    world, folder = world_and_folder()
    online, distilled = Subject(OnlineDPOModule, world, folder), Subject(GKDModule, world, folder)
    (coin,) = (check for check in sample_checks(distilled, some_rows(distilled)) if check.name == "coin")
    checks = (opponent_check(Subject(NashMDModule, world, folder)), drawing_check(online), coin)
    for check in checks:
        assert check.held and check.power >= 1.4 * check.bound, check


@pytest.mark.parametrize("setting", [{"lam": 0.9}, {"temperature": 0.7}])
def test_ppo_passes_at_other_settings(setting):
    found = verify(PPOModule, setting)
    assert found.failed == []
    assert found.has_target == ("lam" in setting)
