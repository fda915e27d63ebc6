"""Recall in a fixed state: Gated DeltaNet-2 beside its relatives on tasks that anyone can generate.

    pip install gdn2_ext[train]
    python examples/recall.py --out recall            # about 10 minutes on an H200
    python examples/recall.py --tasks mqar --seeds 1  # one task, one seed

Three tasks, whose answers alone are trained and scored:

    mqar          multi-query associative recall: n pairs of a key and a value, then every key once, in
                  another order; after each key the model says its value
    needle        noise with one needle in it, a key and its value behind a marker; at the end the key
    multi_needle  the same with n needles of different keys, one of which is asked for

Small language models of two layers whose mixers differ in their gates alone ("gdn2", "kda",
"gated_deltanet", "deltanet"): the same state, and the same number of parameters, which the width of the MLP
evens out. Each is trained on all n at once, everybody on the same batches, and scored on new ones for each n.
The folder gets recall.json (every run), recall.csv (means), recall.md (the table) and recall.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from gdn2_ext.models import GatedDeltaNet2Config, GatedDeltaNet2ForCausalLM

VARIANTS = ("gdn2", "kda", "gated_deltanet", "deltanet")
PAIRS = {"mqar": (16, 32, 64, 128, 256), "needle": (1,), "multi_needle": (2, 4, 8, 16, 32)}
NUM_KEYS, NUM_VALUES, NUM_NOISE = 512, 64, 64
MARKER = NUM_KEYS + NUM_VALUES + NUM_NOISE
VOCABULARY = MARKER + 1
NOTHING = -100  # a target that is not scored


class Run(NamedTuple):
    """One model, trained and scored."""

    task: str
    variant: str
    seed: int


class Batch(NamedTuple):
    """tokens [B, T], and [B, T] what is to be said after each of them, or NOTHING."""

    tokens: Tensor
    targets: Tensor


# -- tasks ---------------------------------------------------------------------------------------------------


def random_keys(batch: int, number: int, generator: torch.Generator) -> Tensor:
    """[batch, number] different keys a row."""
    return torch.rand(batch, NUM_KEYS, generator=generator).argsort(1)[:, :number]


def random_values(batch: int, number: int, generator: torch.Generator) -> Tensor:
    return NUM_KEYS + torch.randint(NUM_VALUES, (batch, number), generator=generator)


def mqar(batch: int, number: int, length: int, generator: torch.Generator) -> Batch:
    """Keys and values in turn, then the keys in another order: 3 * number tokens, whatever the length."""
    keys, values = random_keys(batch, number, generator), random_values(batch, number, generator)
    order = torch.rand(batch, number, generator=generator).argsort(1)
    tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
    targets = torch.full_like(tokens, NOTHING)
    targets[:, 2 * number :] = values.gather(1, order)
    return Batch(tokens, targets)


def needles(batch: int, number: int, length: int, generator: torch.Generator) -> Batch:
    """`number` needles of three tokens in `length` tokens of noise, then the key of one."""
    keys, values = random_keys(batch, number, generator), random_values(batch, number, generator)
    tokens = NUM_KEYS + NUM_VALUES + torch.randint(NUM_NOISE, (batch, length), generator=generator)
    places = 3 * torch.rand(batch, length // 3, generator=generator).argsort(1)[:, :number]
    for offset, part in enumerate((torch.full_like(keys, MARKER), keys, values)):
        tokens.scatter_(1, places + offset, part)
    asked = torch.randint(number, (batch, 1), generator=generator)
    tokens = torch.cat([tokens, torch.full((batch, 1), MARKER), keys.gather(1, asked)], 1)
    targets = torch.full_like(tokens, NOTHING)
    targets[:, -1] = values.gather(1, asked).squeeze(1)
    return Batch(tokens, targets)


TASKS = {"mqar": mqar, "needle": needles, "multi_needle": needles}


# -- models --------------------------------------------------------------------------------------------------


def num_parameters(config: GatedDeltaNet2Config) -> int:
    with torch.device("meta"):
        return sum(x.numel() for x in GatedDeltaNet2ForCausalLM(config).parameters())


def make_config(variant: str, options: argparse.Namespace) -> GatedDeltaNet2Config:
    """Of as many parameters as GDN-2's, to within a column of the MLPs."""

    def config(variant: str, intermediate_size: int) -> GatedDeltaNet2Config:
        return GatedDeltaNet2Config(
            vocab_size=VOCABULARY, hidden_size=options.width, num_hidden_layers=options.layers,
            intermediate_size=intermediate_size, num_heads=options.heads, head_dim=options.head_dim,
            variant=variant, tie_word_embeddings=True, use_chunked_loss=False, use_cache=False,
        )  # fmt: skip

    size = 2 * options.width
    missing = num_parameters(config("gdn2", size)) - num_parameters(config(variant, size))
    return config(variant, size + round(missing / (3 * options.width * options.layers)))


def loss_and_hits(model: torch.nn.Module, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean nats an answer, and which answers [num_answers] are right."""
    tokens, targets = batch.tokens.to(device), batch.targets.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.model(tokens).last_hidden_state[targets != NOTHING]
        logits = model.lm_head(hidden).float()
    answers = targets[targets != NOTHING]
    return functional.cross_entropy(logits, answers), logits.argmax(-1) == answers


def numbers(task: str, options: argparse.Namespace) -> tuple[int, ...]:
    """Of pairs or needles."""
    return tuple(options.pairs) if options.pairs and task != "needle" else PAIRS[task]


def train_and_score(run: Run, options: argparse.Namespace) -> dict:
    """Trains one model and scores it: accuracy for every number of pairs or needles."""
    torch.set_num_threads(options.threads)
    device, make_batch = torch.device(options.device), TASKS[run.task]
    torch.manual_seed(run.seed)
    config = make_config(run.variant, options)
    model = GatedDeltaNet2ForCausalLM(config).to(device).train()
    decayed = [x for x in model.parameters() if x.dim() > 1]
    others = [x for x in model.parameters() if x.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.95), fused=device.type == "cuda",
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.1, cycle_momentum=False
    )
    counts = numbers(run.task, options)
    generator = torch.Generator().manual_seed(run.seed)
    begin = time.perf_counter()
    for step in range(options.steps):
        number = counts[step % len(counts)]
        # As many tokens in every batch of mqar, whose sequences grow with the number of pairs.
        batch_size = options.batch * max(counts) // number if run.task == "mqar" else options.batch
        loss, _ = loss_and_hits(model, make_batch(batch_size, number, options.length, generator), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    accuracy = {}
    generator = torch.Generator().manual_seed(2**31 + run.seed)
    with torch.no_grad():
        for number in counts:
            hits = [
                loss_and_hits(model, make_batch(options.batch, number, options.length, generator), device)[1]
                for _ in range(options.test_batches)
            ]
            accuracy[number] = torch.cat(hits).float().mean().item()
    return {
        **run._asdict(),
        "parameters": num_parameters(config),
        "state": config.num_hidden_layers * config.num_heads * config.head_dim**2,
        "final_loss": loss.item(),
        "seconds": time.perf_counter() - begin,
        "accuracy": accuracy,
    }


# -- results -------------------------------------------------------------------------------------------------


def means(results: list[dict]) -> list[dict]:
    """Mean and standard deviation of the accuracy over seeds, for every task, number and variant."""
    scores: dict[tuple, list[float]] = {}
    for result in results:
        for number, accuracy in result["accuracy"].items():
            scores.setdefault((result["task"], int(number), result["variant"]), []).append(accuracy)
    return [
        {"task": task, "number": number, "variant": variant, "seeds": len(x), "accuracy": statistics.mean(x),
         "deviation": statistics.stdev(x) if len(x) > 1 else 0.0}
        for (task, number, variant), x in sorted(scores.items())
    ]  # fmt: skip


def table(rows: list[dict]) -> str:
    """Markdown: a line for every task and number, a column for every variant."""
    variants = [x for x in VARIANTS if any(row["variant"] == x for row in rows)]
    lines = ["| task | n | " + " | ".join(variants) + " |", "|---|---|" + "---|" * len(variants)]
    for task, number in dict.fromkeys((row["task"], row["number"]) for row in rows):
        cells = {row["variant"]: row for row in rows if (row["task"], row["number"]) == (task, number)}
        scores = [
            f"{100 * cells[x]['accuracy']:.1f} ± {100 * cells[x]['deviation']:.1f}" if x in cells else "-"
            for x in variants
        ]
        lines.append(f"| {task} | {number} | " + " | ".join(scores) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    tasks = [task for task in TASKS if any(row["task"] == task for row in rows)]
    figure = Figure(figsize=(4 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for variant in VARIANTS:
            line = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            if line:
                numbers, scores = [x["number"] for x in line], [100 * x["accuracy"] for x in line]
                axes.errorbar(
                    numbers, scores, [100 * x["deviation"] for x in line], marker="o", label=variant
                )
        axes.set(title=task, xlabel="pairs or needles", ylabel="accuracy, %", xscale="log", ylim=(-3, 103))
    axes.legend()
    figure.savefig(path, dpi=150)


def save(results: list[dict], options: argparse.Namespace) -> str:
    """Writes what there is so far, and gives the table."""
    results = sorted(results, key=lambda x: (x["task"], x["variant"], x["seed"]))
    rows, folder = means(results), options.out
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    arguments = {
        name: value for name, value in vars(options).items() if name not in ("out", "jobs", "threads")
    }
    record = {"device": device, "torch": torch.__version__, "options": arguments, "runs": results}
    (folder / "recall.json").write_text(json.dumps(record, indent=2) + "\n")
    with open(folder / "recall.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "recall.md").write_text(table(rows))
    return table(rows)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--pairs", nargs="+", type=int, help="numbers of pairs or needles; default: by task")
    parser.add_argument("--length", type=int, default=1024, help="tokens of noise around needles")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32, help="sequences, of mqar the longest ones")
    parser.add_argument("--test-batches", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="models that are trained at the same time")
    parser.add_argument("--threads", type=int, default=max(1, torch.get_num_threads()), help="of a job")
    parser.add_argument("--out", type=Path, default=Path("recall"))
    options = parser.parse_args(arguments)
    for task in options.tasks:
        largest = max(numbers(task, options))
        if largest > (NUM_KEYS if task == "mqar" else min(NUM_KEYS, options.length // 3)):
            parser.error(
                f"--pairs: {largest} need as many of {NUM_KEYS} keys, needles 3 tokens of --length each"
            )
    if min(options.steps, options.batch, options.test_batches, options.jobs) < 1:
        parser.error("--steps, --batch, --test-batches and --jobs: expected at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(*x) for x in ((t, v, s) for t in options.tasks for s in options.seeds for v in options.variants)
    ]
    results: list[dict] = []
    progress = tqdm(total=len(runs), unit="model", file=sys.stderr)

    def add(result: dict) -> None:
        results.append(result)
        save(results, options)
        scores = " ".join(f"{n}:{100 * x:.0f}%" for n, x in result["accuracy"].items())
        progress.write(
            f"{result['task']} {result['variant']} seed {result['seed']}: {scores}", file=sys.stderr
        )
        progress.update()

    if options.jobs == 1:
        for run in runs:
            add(train_and_score(run, options))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for done in as_completed([pool.submit(train_and_score, run, options) for run in runs]):
                add(done.result())
    progress.close()
    plot(means(results), options.out / "recall.png")
    print(save(results, options), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
