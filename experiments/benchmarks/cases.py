"""What is compared with the peer: one training each, who runs it with which flags, and what is asked of the figures.

A case is trained by several sides: ``peer`` and ``limit`` by their scripts, and ours under one or more names. A goal
reads some of the steps of one of our sides against the same steps of the peer, and says what must come out.
"""

from pathlib import Path
from typing import NamedTuple

PEER, LIMIT = "peer", "limit"
BUDGET = ("--max-tokens", "512")
"""Tokens of a micro-batch: it bounds activations, and the gradient stays that of the whole step."""
LARGER_BUDGET = ("--max-tokens", "768")
"""The same where memory allows fewer passes."""
SMALL_BUDGET = ("--max-tokens", "2048")
"""The same for the small model, whose passes take next to no time."""


class Goal(NamedTuple):
    """What one line of the results is about.

    Attributes:
        name: what the line is called, behind the case's name.
        side: whose steps of ours are read.
        steps: first and last step that count, as a slice; the first step of a run warms up.
        speed: least ratio of our speed to the peer's; None asks nothing.
        share: least share of the limit's speed; 0 shows it and asks nothing.
        memory: largest ratio of our peak of resident memory to that of ``memory_of``.
        memory_of: the side that memory is held against.
    """

    name: str
    side: str = "ours"
    steps: slice = slice(1, None)
    speed: float | None = None
    share: float | None = None
    memory: float | None = None
    memory_of: str = PEER


class Case(NamedTuple):
    """One training, run by several sides in turn.

    Attributes:
        stage: sft, reward, dpo, grpo or ppo.
        goals: what is asked of it.
        flags: those that every side gets but the limit.
        ours: further flags of each of our sides.
        limit: flags of the limit; None where there is none.
        model: "base", "scored" (with a score head, for reward models) or "small" (about a million parameters).
        same_losses: largest difference of losses where the algorithms are the same: of the first update, and of later
            ones; an adapter's later losses depend on how it was drawn. None where each side samples for itself.
        has_peer: whether the peer runs it too.
    """

    stage: str
    goals: tuple[Goal, ...]
    flags: tuple[str, ...]
    ours: dict[str, tuple[str, ...]]
    limit: tuple[str, ...] | None = None
    model: str = "base"
    same_losses: tuple[float, float] | None = None
    has_peer: bool = True

    @property
    def sides(self) -> list[str]:
        """Who runs it, in turn."""
        peer, limit = [PEER] if self.has_peer else [], [LIMIT] if self.limit is not None else []
        return [*self.ours, *peer, *limit]


ROWS = ("--batch", "4", "--max-length", "512")
ROLLOUTS = ("--batch", "8", "--completion", "48", "--max-length", "512")
EXACT, ADAPTER = (1e-3, 1e-3), (1e-3, 1e-2)
PASS = 5
"""Steps of each of the two passes of ``dpo_lora``."""


def offline(*further: str, steps: int = 6) -> tuple[str, ...]:
    """Flags of a stage on fixed rows in file order."""
    return (*ROWS, "--steps", str(steps), *further)


def peer_only(case: Case) -> tuple[str, ...]:
    """Flags that the peer's script needs for the same rows in the same order."""
    return ("--in-order",) if case.same_losses is not None else ()


CASES = {
    "sft_full": Case(
        "sft", (Goal("", speed=2.1, share=0.8, memory=0.65),), offline(), {"ours": LARGER_BUDGET}, (), "base", EXACT
    ),
    "sft_lora": Case(
        "sft", (Goal("", speed=2.8, share=0.8),), offline("--lora"), {"ours": BUDGET}, ("--lora",), "base", ADAPTER
    ),
    "reward_full": Case(
        "reward",
        (Goal("", speed=2.0, share=0.8, memory=0.65),),
        offline(),
        {"ours": BUDGET},
        ("--shared-prompt",),
        "scored",
        EXACT,
    ),
    "dpo_lora": Case(
        "dpo",
        (
            Goal("first epoch", steps=slice(1, PASS), speed=3.0, share=0.75, memory=0.35),
            # The limit forwards the reference in every epoch, so it is none where that is remembered.
            Goal("later epochs", steps=slice(PASS, None), speed=4.0),
        ),
        offline("--lora", "--rows", str(4 * PASS), steps=2 * PASS),
        {"ours": (*BUDGET, "--epochs", "2")},
        ("--lora", "--shared-prompt"),
        "base",
        ADAPTER,
    ),
    "grpo_full": Case(
        "grpo", (Goal("", speed=1.5),), (*ROLLOUTS, "--group", "4", "--steps", "4"), {"ours": BUDGET}
    ),
    "ppo_full": Case(
        "ppo",
        (
            Goal("separate critic", "separate", speed=1.05, memory=0.8),
            Goal("shared trunk", "shared", speed=1.4, memory=0.8),
        ),
        (*ROLLOUTS, "--epochs", "4", "--steps", "3"),
        {"separate": (*BUDGET, "--critic", "separate"), "shared": (*BUDGET, "--critic", "shared")},
    ),
    "ppo_lora": Case(
        "ppo",
        (
            Goal("shared trunk", "shared", speed=1.5, memory=0.45),
            Goal("shared trunk, 4 bits", "nf4", memory=1.0, memory_of="shared"),
        ),
        (*ROLLOUTS, "--epochs", "4", "--steps", "3", "--lora"),
        {
            "shared": (*BUDGET, "--critic", "shared"),
            "nf4": (*BUDGET, "--critic", "shared", "--quantization", "nf4"),
        },
    ),
    "ppo_small": Case(
        "ppo",
        (Goal("separate critic", "separate", speed=2.0), Goal("shared trunk", "shared", speed=2.0)),
        ("--batch", "64", "--completion", "64", "--epochs", "4", "--steps", "8", "--rows", "512"),
        {"separate": (*SMALL_BUDGET, "--critic", "separate"), "shared": (*SMALL_BUDGET, "--critic", "shared")},
        model="small",
    ),
}  # fmt: skip

# -- on one GPU -------------------------------------------------------------------------------------------------------

GPU_ROWS = ("--batch", "32", "--max-length", "512", "--rows", "512")
GPU_ROLLOUTS = ("--batch", "64", "--completion", "64", "--max-length", "512", "--rows", "1921")
GPU_BUDGET = ("--max-tokens", "16384")
ON_GPU = ("--set", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed")
"""The peer's script and the limit's are to be handed over with the same two changes: on the GPU, products in bf16."""
HALF = (2e-2, 1e-1)
"""Largest difference of losses where both sides multiply in bf16."""
WARM = slice(4, None)
"""Steps that count: the first ones choose kernels and fill the allocator's pools."""


def on_gpu(*further: str) -> tuple[str, ...]:
    """Flags of one of our sides on a GPU."""
    return (*GPU_BUDGET, *further, *ON_GPU)


GPU_CASES = {
    "sft_full": Case(
        "sft",
        (Goal("", steps=WARM, share=0.0),),
        (*GPU_ROWS, "--steps", "12"),
        {"ours": on_gpu()},
        (),
        "base",
        HALF,
    ),
    "sft_lora": Case(
        "sft",
        (Goal("", steps=WARM, share=0.0),),
        (*GPU_ROWS, "--steps", "12", "--lora"),
        {"ours": on_gpu()},
        ("--lora",),
        "base",
        HALF,
    ),
    "reward_full": Case(
        "reward",
        (Goal("", steps=WARM, share=0.0),),
        (*GPU_ROWS, "--steps", "12"),
        {"ours": on_gpu()},
        ("--shared-prompt",),
        "scored",
        HALF,
    ),
    "dpo_lora": Case(
        "dpo",
        (Goal("", steps=WARM, share=0.0),),
        (*GPU_ROWS, "--steps", "12", "--lora"),
        {"ours": on_gpu("--epochs", "1")},
        ("--lora", "--shared-prompt"),
        "base",
        HALF,
    ),
    "grpo_full": Case(
        "grpo", (Goal("", steps=slice(2, None)),), (*GPU_ROLLOUTS, "--group", "8", "--steps", "5"), {"ours": on_gpu()}
    ),
    "ppo_full": Case(
        "ppo",
        (Goal("shared trunk", "shared", steps=slice(2, None)),),
        (*GPU_ROLLOUTS, "--epochs", "4", "--steps", "5"),
        {"shared": on_gpu("--critic", "shared")},
    ),
}


class Suite(NamedTuple):
    """What is compared on one kind of machine.

    Attributes:
        cases: by name.
        memory: what the figures of memory are.
        notes: file in this folder with text written by hand: why a figure is what it is.
        out: the page, a file in this folder.
    """

    cases: dict[str, Case]
    memory: str
    notes: str
    out: str

    @property
    def said(self) -> list[str]:
        """Lines of the text written by hand; none without such a file."""
        file = Path(__file__).resolve().parent / self.notes
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


RESIDENT = "the peak of what a process has resident, from start to end"
ALLOCATED = "the peak of what PyTorch has allocated on the GPU, from start to end"
SUITES = {
    "cpu": Suite(CASES, RESIDENT, "bounds.md", "results.md"),
    "gpu": Suite(GPU_CASES, ALLOCATED, "gpu_bounds.md", "gpu.md"),
}
