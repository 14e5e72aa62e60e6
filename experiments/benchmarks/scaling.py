"""Measure how the cost of an update grows with length, vocabulary, batch, group size and spread of completion lengths.

    python experiments/benchmarks/scaling.py [--only length vocabulary ...] [--out experiments/benchmarks/scaling.md]

Each point is a separate process: a small Llama with random weights takes a few SFT updates on sequences of the given
lengths, split into micro-batches. It measures the median seconds of an update, and the increase of peak resident memory
over the resident memory after the model is built and has processed a first token. Writes a table and a plot.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WARM, TIMED = 1, 3


class Point(NamedTuple):
    """The size of one update.

    Attributes:
        prompt: tokens of each prompt.
        completions: tokens of each completion; completions of a group share one prompt.
        group: completions per prompt.
        vocabulary: vocabulary size of the model.
        max_tokens: maximum cells of a micro-batch; None uses one micro-batch for the update.
        lora: train an adapter, so that only the logits grow with the vocabulary.
    """

    prompt: int
    completions: tuple[int, ...]
    group: int = 1
    vocabulary: int = 4096
    max_tokens: int | None = 2048
    lora: bool = False

    @property
    def tokens(self) -> int:
        """Return the tokens as a user counts them: each prompt once per completion."""
        return len(self.completions) * self.prompt + sum(self.completions)


def spread(share: float, count: int = 16, mean: int = 128) -> tuple[int, ...]:
    """Return lengths from mean (1 - share) to mean (1 + share), evenly spaced."""
    return tuple(round(mean * (1 + share * (2 * i / (count - 1) - 1))) for i in range(count))


class Sweep(NamedTuple):
    """One axis of the measurement.

    Attributes:
        axis: label of the x-axis.
        expected: expected growth of the curve.
        points: the update at each value.
    """

    axis: str
    expected: str
    points: dict[float, Point]


SWEEPS = {
    "length": Sweep(
        "tokens of a sequence, 4 sequences",
        "seconds: a line, and attention's square above it; memory: a line once a sequence fills a micro-batch",
        {n: Point(n // 2, (n - n // 2,) * 4) for n in (128, 256, 512, 1024, 2048)},
    ),
    "vocabulary": Sweep(
        "words, 4 sequences of 512 tokens, LoRA",
        "seconds: a line; memory: flat",
        {v: Point(256, (256,) * 4, vocabulary=v, lora=True) for v in (32_768, 65_536, 131_072, 262_144)},
    ),
    "batch": Sweep(
        "sequences of 256 tokens, micro-batches of 2048 cells",
        "seconds: a line; memory: flat once an update fills a micro-batch",
        {b: Point(128, (128,) * b) for b in (2, 4, 8, 16, 32)},
    ),
    "group": Sweep(
        "completions of 32 tokens to one prompt of 512",
        "seconds: the prompt once, then a line of little slope",
        {g: Point(512, (32,) * g, group=g) for g in (1, 2, 4, 8, 16)},
    ),
    "spread": Sweep(
        "spread of 16 completions around 128 tokens, as a share",
        "seconds and memory: flat, since rows of like length are cut together",
        {s: Point(64, spread(s)) for s in (0.0, 0.25, 0.5, 0.75, 0.95)},
    ),
}


# -- one point --------------------------------------------------------------------------------------------------------


def measured(point: Point) -> dict[str, float]:
    """Train on updates of this size; return the seconds of an update and the megabytes that it needed."""
    import torch
    from lightning.pytorch import Callback, Trainer
    from torch.utils.data import DataLoader

    from rlhf_lightning.models.lora import LoraSettings
    from rlhf_lightning.modules.sft import SFTModule

    seconds: list[float] = []

    class Clock(Callback):
        """Records the time of each update, and the resident memory before the first."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            with torch.no_grad():  # exclude memory that libraries allocate once and keep
                (one,) = update(Point(1, (1,), vocabulary=point.vocabulary)).micro_batches
                module.policy(module.lay_out(one.sequences))
            self.resident, self.begun = resident(), time.perf_counter()

        def on_train_batch_end(self, *args: Any) -> None:
            seconds.append(time.perf_counter() - self.begun)
            self.begun = time.perf_counter()

    torch.manual_seed(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        source, lora = write_config(Path(folder), point.vocabulary), LoraSettings() if point.lora else None
        module = SFTModule(init_from=source, from_scratch=True, lora=lora)
        trainer = Trainer(
            max_steps=WARM + TIMED, callbacks=[clock], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        steps: Any = [update(point)] * (WARM + TIMED)
        trainer.fit(module, DataLoader(steps, batch_size=None))
    return {"seconds": median(seconds[WARM:]), "megabytes": peak() - clock.resident, "resident": clock.resident}


def peak() -> float:
    """Return peak resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def resident() -> float:
    """Return the current resident memory, MB; the peak so far if the system does not report it."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * resource.getpagesize() / 1e6 if pages.exists() else peak()


def write_config(folder: Path, vocabulary: int) -> str:
    """Write the config of a small Llama and a tokenizer; return the folder."""
    from transformers import LlamaConfig

    from rlhf_lightning.worlds._assistant_text import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=4096, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def update(point: Point) -> Any:
    """Return an optimizer step of random tokens, split into micro-batches."""
    import torch

    from rlhf_lightning.models.layout import cut_sequences, select
    from rlhf_lightning.types import DemonstrationBatch, MicroBatchLimits, Sequences, Step

    def ids(count: int) -> Any:
        return torch.randint(5, point.vocabulary, (count,))

    completions = tuple(ids(count) for count in point.completions)
    sequences = Sequences(
        prompts=tuple(ids(point.prompt) for _ in range(-(-len(completions) // point.group))),
        completions=completions,
        parents=tuple(row // point.group for row in range(len(completions))),
        supervised=tuple(torch.ones(len(row), dtype=torch.bool) for row in completions),
    )
    cuts = cut_sequences(sequences, limits=MicroBatchLimits(None, point.max_tokens), pack_rows=point.group > 1)
    batches = tuple(DemonstrationBatch(select(sequences, cut), torch.ones(len(cut))) for cut in cuts)
    return Step(batches, len(completions), sum(point.completions))


# -- all points -------------------------------------------------------------------------------------------------------


def in_a_process(point: Point, threads: int) -> dict[str, float]:
    """Measure a point in a separate process, so that its peak memory is its own."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).resolve()), "--point", json.dumps(point._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("POINT ")), None)
    if line is None:
        raise SystemExit(f"{point} could not be measured:\n{(done.stdout + done.stderr)[-2000:]}")
    return json.loads(line.removeprefix("POINT "))


def growth(values: list[float], figures: list[float]) -> str:
    """Return the growth exponent of the curve's upper half: 1 is linear, 0 is constant. Empty if the
    axis starts at 0.
    """
    import math

    half = len(values) // 2
    if not values[half] or min(figures[half], figures[-1]) <= 0:
        return ""
    return f"{math.log(figures[-1] / figures[half]) / math.log(values[-1] / values[half]):.2f}"


def table(found: dict[str, dict[float, dict[str, float]]]) -> str:
    """Return the Markdown page with one table per axis."""
    lines = ["# How cost grows", "", "Seconds of an update, and megabytes that it took beyond the loaded model.", ""]
    for name, points in found.items():
        sweep, values = SWEEPS[name], list(points)
        lines += [f"## {name}", "", f"x: {sweep.axis}. Expected: {sweep.expected}.", ""]
        lines += ["| x | tokens | seconds | MB |", "|---|---|---|---|"]
        for value, row in points.items():
            tokens = sweep.points[value].tokens
            lines.append(f"| {value:g} | {tokens} | {row['seconds']:.3f} | {row['megabytes']:.0f} |")
        for unit in ("seconds", "megabytes"):
            exponent = growth(values, [row[unit] for row in points.values()])
            if exponent:
                lines += ["", f"Exponent of the {unit} over the upper half of x: {exponent}."]
        lines.append("")
    return "\n".join(lines)


def picture(found: dict[str, dict[float, dict[str, float]]], file: Path) -> None:
    """Plot seconds and megabytes over each axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(found), figsize=(3.2 * len(found), 5), squeeze=False)
    for column, (name, points) in enumerate(found.items()):
        for row, unit in enumerate(("seconds", "megabytes")):
            axis = axes[row][column]
            axis.plot(list(points), [point[unit] for point in points.values()], marker="o")
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.set_title(f"{name}: {unit}", fontsize=9)
            axis.set_xlabel(SWEEPS[name].axis.split(",")[0], fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Measure one point, or all points of the named axes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE / "scaling.md")
    parser.add_argument("--point", default=None, help="measure this point alone, as JSON, and print its figures")
    args = parser.parse_args()
    if args.point is not None:
        print("POINT " + json.dumps(measured(Point(**json.loads(args.point)))))
        return
    found: dict[str, dict[float, dict[str, float]]] = {}
    for name in args.only:
        found[name] = {}
        for value, point in SWEEPS[name].points.items():
            found[name][value] = in_a_process(point, args.threads)
            figures = found[name][value]
            print(f"{name} {value:g}: {figures['seconds']:.3f} s, {figures['megabytes']:.0f} MB", flush=True)
        args.out.write_text(table(found), encoding="utf-8")
        picture(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
