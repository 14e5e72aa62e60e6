"""Test losses of other projects: adapters in any file, the same checks, and the smallest input with a difference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import refused

from rlhf_lightning import cli
from rlhf_lightning.modules import DPOModule
from rlhf_lightning.verification.contract import Verification, verify
from rlhf_lightning.verification.foreign import adapters, class_of, import_alone
from rlhf_lightning.verification.foreign_checks import FEW, by_row
from rlhf_lightning.verification.subject import at_most
from rlhf_lightning.verification.verify import report_of

EXAMPLE = Path(__file__).resolve().parents[2] / "experiments" / "verification" / "my_adapter.py"

FILE = """
import torch
from typing import Literal
from torch import Tensor
from torch.nn.functional import logsigmoid
from rlhf_lightning.modules import CriticFreeModule, DPOModule, PPOModule
from rlhf_lightning.types import Advantages, CriticValues, PolicyLogprobs, PreferenceLogprobs, Rollout
from rlhf_lightning.verification.foreign import RunsAs, compared_with


@compared_with(DPOModule)
def Wrong(pairs: PreferenceLogprobs, beta: float = 0.5) -> Tensor:
    return -logsigmoid(beta * pairs.margin / pairs.chosen_lengths).mean()


def Silent(pairs: PreferenceLogprobs, beta: float = 0.5) -> Tensor:
    return -3 * logsigmoid(beta * pairs.margin)


@compared_with(PPOModule)
def Critic(values: CriticValues, value_clip: float = 0.2) -> Tensor:
    near = values.old_values + (values.values - values.old_values).clamp(-value_clip, value_clip)
    both = torch.maximum((values.values - values.returns) ** 2, (near - values.returns) ** 2)
    return 0.5 * both[values.completion_mask].mean()


@compared_with(CriticFreeModule)
def Mean(rollout: Rollout) -> Tensor:
    rewards, group = rollout.extras["rewards"].sum(-1), rollout.group
    mean = torch.zeros(int(group.max()) + 1, dtype=rewards.dtype).index_add(0, group, rewards) / group.bincount()
    return (rewards - mean[group]).unsqueeze(-1) * rollout.completion_mask


@compared_with(RunsAs(CriticFreeModule))
def Plain(logprobs: PolicyLogprobs) -> Tensor:
    ratio = (logprobs.logprobs - logprobs.old_logprobs).clamp(-20, 20).exp()
    loss = -logprobs.advantages * ratio * logprobs.completion_mask
    return loss.sum() / logprobs.completion_mask.sum()
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "their_losses.py"
    path.write_text(FILE)
    return str(path)


def one(spec: str, **settings):
    (found,) = adapters(spec, settings)
    return found


def failed(found) -> set[str]:
    return {check.name for check in found.checks if not check.held}


def test_the_example_equals_the_shipped_classes():
    titles = [adapter.title for adapter in adapters(str(EXAMPLE), {})]
    assert titles == ["MyDPO sigmoid", "MyDPO hinge"]
    adapter = one(f"{EXAMPLE}:MyDPO", beta=0.7)
    assert adapter.base is DPOModule and adapter.base_settings == {"beta": 0.7}
    found = verify(class_of(adapter), adapter.base_settings)
    assert found.held and found.compared_with == "DPOModule" and found.settings["beta"] == 0.7
    assert {"reduction", "as shipped"} <= {check.name for check in found.checks}


def test_a_difference_is_shown_on_the_smallest_input(file):
    found = verify(class_of(one(f"{file}:Wrong")), with_convergence=False)
    assert "as shipped" in failed(found)
    said = next(check.advice for check in found.checks if check.name == "as shipped")
    assert "it is not DPOModule" in said and "policy chosen" in said.replace("_", " ")
    assert said.count("[") >= 8, "one row of every field"


def test_a_loss_without_a_base_class_is_compared_with_the_class_of_equal_gradient(file):
    found = verify(class_of(one(f"{file}:Silent")))
    assert found.held and "3 times" in found.convergence.source


@pytest.mark.parametrize("name", ["Critic", "Mean", "Plain"])
def test_other_families_pass(file, name):
    adapter = one(f"{file}:{name}")
    found = verify(class_of(adapter), adapter.base_settings, with_convergence=False)
    expected = {"Mean": {"missing score"}}.get(name, set())  # NaN affects the whole group
    assert failed(found) == expected


def test_mean_losses_have_per_row_gradients(file):
    adapter = one(f"{file}:Plain")
    module = class_of(adapter)

    def called(given):
        return adapter.function(given)

    from rlhf_lightning.verification.contract import world_and_folder
    from rlhf_lightning.verification.diagnosis import probe_input
    from rlhf_lightning.verification.foreign_checks import some_rows_of
    from rlhf_lightning.verification.subject import Subject

    world, folder = world_and_folder()
    subject = Subject(module, world, folder)
    many = some_rows_of(probe_input(subject, subject.module), list(range(FEW + 4)))
    leaf = many.logprobs.detach().clone().requires_grad_()
    shared = by_row(called, subject.module, many._replace(logprobs=leaf))
    ratio = (leaf - many.old_logprobs).exp()
    exact = torch.where(many.completion_mask, -many.advantages * ratio, 0.0)
    slopes = [torch.autograd.grad(values[many.completion_mask].sum(), leaf)[0] for values in (shared, exact)]
    torch.testing.assert_close(*slopes, atol=1e-9, rtol=1e-9)


def test_unknown_names_are_refused_with_suggestions(file, capsys):
    with refused("unknown-name", "there are Critic, Mean"):
        adapters(f"{file}:NoSuchLoss", {})
    with refused("unknown-setting", "'bta'; did you mean beta?"):
        adapters(f"{file}:Wrong", {"bta": 1})
    with refused("no-file"):
        adapters("no_such_file.py:Loss", {})
    odd = Path(file).with_name("odd_losses.py")
    odd.write_text("def loss(given: 'Unknown'):\n    return 0\n")
    with refused("wrong-kind", "annotations of loss"):
        adapters(f"{odd}:loss", {})
    assert cli.main(["verify", "--foreign", f"{file}:NoSuchLoss"]) == 2
    assert "there are Critic, Mean" in capsys.readouterr().err


def test_adapter_reports_are_written(file, tmp_path, capsys):
    table, page = tmp_path / "peers.md", tmp_path / "page.html"
    arguments = ["--beta", "0.5", "--markdown", str(table), "--report", str(page)]
    assert cli.main(["verify", "--foreign", f"{file}:Wrong", *arguments]) == 1
    text = table.read_text()
    assert "| DPOModule " in text and "as shipped" in text and "it is not DPOModule" in text
    html = page.read_text()
    assert "<polyline" in html and "as shipped" in html and "gold reward" in html
    assert "as shipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failing", "label"),
    [("extremes", "mistake"), ("target", "possible mistake"), (None, "it differs from the shipped class")],
)
def test_only_a_failed_check_makes_a_difference_a_mistake(failing: str | None, label: str) -> None:
    checks = [at_most(name, float(name == failing), 0, "advice") for name in ("extremes", "target")]
    found = Verification("Theirs", {}, checks, None, 0.0, 0.0, ["the clip is left out"])
    assert f"  {label}: the clip is left out" in report_of(found, brief=True).splitlines()


def test_a_module_is_imported_without_its_parent_packages(tmp_path):
    package = tmp_path / "heavy_project" / "losses"
    package.mkdir(parents=True)
    (tmp_path / "heavy_project" / "__init__.py").write_text("import no_such_engine\n")
    (package / "__init__.py").write_text("import no_such_engine\n")
    (package / "helpers.py").write_text("TWO = 2\n")
    (package / "pairs.py").write_text(
        "import no_such_engine\nfrom no_such_engine import Engine\nfrom .helpers import TWO\nVALUE = 2 * TWO\n"
    )
    code = (
        "from rlhf_lightning.verification.foreign import import_alone\n"
        "print(import_alone('heavy_project.losses.pairs', stubs=('no_such_engine',)).VALUE)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**__import__("os").environ, "PYTHONPATH": f"{tmp_path}:{EXAMPLE.parents[2]}"},
    )  # fmt: skip
    assert done.stdout.strip().endswith("4"), done.stderr
    with refused("not-installed"):
        import_alone("no_such_project.losses")
