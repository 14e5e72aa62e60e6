"""Define the comparison with the peer library: cases, flags of each side, and goals for the figures.

A case is one training run, made by several sides: ``peer`` and ``limit`` through their own scripts, and one or more
variants of this package. A goal compares some steps of one of our variants with the same steps of the peer and sets a
bound.
"""

from pathlib import Path
from typing import NamedTuple

PEER, LIMIT = "peer", "limit"
BUDGET = ("--max-tokens", "512")
"""Token budget of a micro-batch. It bounds activation memory; the gradient remains that of the whole step."""
LARGER_BUDGET = ("--max-tokens", "768")
"""Token budget for cases with enough memory for fewer passes."""
LARGEST_BUDGET = ("--max-tokens", "1024")
"""Token budget for cases that stay far below their memory goal."""
SMALL_BUDGET = ("--max-tokens", "2048")
"""Token budget for the small model, whose forward passes are very short."""


class Goal(NamedTuple):
    """One line of the results.

    Attributes:
        name: label of the line, appended to the case's name.
        side: the variant of this package that is measured.
        steps: the steps that count, as a slice; by default all but the first, which is warm-up.
        speed: minimum ratio of our speed to the peer's; None sets no bound.
        share: minimum fraction of the limit's speed; 0 shows the fraction without a bound.
        memory: maximum ratio of our peak resident memory to that of ``memory_of``.
        memory_of: the side whose memory is the denominator.
    """

    name: str
    side: str = "ours"
    steps: slice = slice(1, None)
    speed: float | None = None
    share: float | None = None
    memory: float | None = None
    memory_of: str = PEER


class Case(NamedTuple):
    """One training run, made by several sides in turn.

    Attributes:
        stage: sft, reward, dpo, grpo or ppo.
        goals: bounds for the figures.
        flags: flags of every side except the limit.
        ours: additional flags of each of our variants, by its name.
        limit: flags of the limit; None if the case has no limit.
        model: "base", "scored" (with a score head, for reward models) or "small" (about a million parameters).
        same_losses: maximum difference of losses if both sides run the same algorithm: first for the first update, then
            for later updates. Later losses of an adapter depend on its random initial weights. None if each side
            samples its own completions.
        has_peer: whether the peer runs the case too.
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
        """Return the sides that run the case, in order."""
        peer, limit = [PEER] if self.has_peer else [], [LIMIT] if self.limit is not None else []
        return [*self.ours, *peer, *limit]


ROWS = ("--batch", "4", "--max-length", "512")
ROLLOUTS = ("--batch", "8", "--completion", "48", "--max-length", "512")
EXACT, ADAPTER = (1e-3, 1e-3), (1e-3, 1e-2)
PASS = 5
"""Steps of each of the two epochs of ``dpo_lora``."""


def offline(*further: str, steps: int = 6) -> tuple[str, ...]:
    """Return the flags of a stage on fixed rows in file order."""
    return (*ROWS, "--steps", str(steps), *further)


def peer_only(case: Case) -> tuple[str, ...]:
    """Return the flags that make the peer's script read the same rows in the same order."""
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
        {"ours": LARGEST_BUDGET},
        ("--shared-prompt",),
        "scored",
        EXACT,
    ),
    "dpo_lora": Case(
        "dpo",
        (
            Goal("first epoch", steps=slice(1, PASS), speed=3.0, share=0.75, memory=0.35),
            # The limit recomputes the reference in every epoch. It is no bound for later epochs, which use cached
            # log-probabilities.
            Goal("later epochs", steps=slice(PASS, None), speed=4.0),
        ),
        offline("--lora", "--rows", str(4 * PASS), steps=2 * PASS),
        {"ours": (*LARGEST_BUDGET, "--epochs", "2")},
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
"""Changes of the peer's and the limit's scripts that a GPU needs: run on the GPU, with matrix products in bf16."""
HALF = (2e-2, 1e-1)
"""Maximum difference of losses if both sides multiply in bf16."""
WARM = slice(4, None)
"""Steps that count. The first steps select kernels and fill the allocator's pools."""


def on_gpu(*further: str) -> tuple[str, ...]:
    """Return the flags of one of our variants on a GPU."""
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
    """The comparison on one kind of machine.

    Attributes:
        cases: the cases, by name.
        memory: what the memory figures measure.
        notes: file in this folder with handwritten explanations of the figures.
        out: file name of the page, in this folder.
    """

    cases: dict[str, Case]
    memory: str
    notes: str
    out: str

    @property
    def said(self) -> list[str]:
        """Return the lines of the handwritten notes; empty if the file is missing."""
        file = Path(__file__).resolve().parent / self.notes
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


RESIDENT = "the peak of what a process has resident, from start to end"
ALLOCATED = "the peak of what PyTorch has allocated on the GPU, from start to end"
SUITES = {
    "cpu": Suite(CASES, RESIDENT, "bounds.md", "results.md"),
    "gpu": Suite(GPU_CASES, ALLOCATED, "gpu_bounds.md", "gpu.md"),
}
