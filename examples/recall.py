"""Recall in a fixed state: Gated DeltaNet-2 beside its relatives on tasks that anyone can generate.

    pip install .[train]
    python examples/recall.py --out recall            # a quarter of an hour on an H200
    python examples/recall.py --tasks mqar --seeds 1  # one task, one seed

Three tasks, whose answers alone are trained and scored:

    mqar          multi-query associative recall: n pairs of a key and a value, then every key once, in
                  another order; after each key the model says its value
    needle        noise with one needle in it, a key and its value behind a marker; at the end the key
    multi_needle  the same with n needles of different keys, one of which is asked for

Small language models of two layers whose mixers differ in their gates alone ("gdn2", "kda",
"gated_deltanet", "deltanet"): the same state, and the same number of parameters, which the width of the MLP
evens out. Each is trained on all n, first on few pairs and in little noise, all on the same batches, and
scored on new ones for each n. The folder gets recall.json (every run), recall.csv (means), recall.md (the
table) and recall.png. What its recall.json has already is not run again: a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from gdn2_ext.models import GatedDeltaNet2Config, GatedDeltaNet2ForCausalLM

VARIANTS = ("gdn2", "kda", "gated_deltanet", "deltanet")
PAIRS = {"mqar": (4, 8, 16, 32, 64, 128, 256), "needle": (1,), "multi_needle": (2, 4, 8, 16, 32)}
NUM_KEYS, NUM_VALUES, NUM_NOISE = 512, 64, 64
MARKER = NUM_KEYS + NUM_VALUES + NUM_NOISE
VOCABULARY = MARKER + 1


class Run(NamedTuple):
    """One model, trained and scored."""

    task: str
    variant: str
    seed: int


class Batch(NamedTuple):
    """tokens [B, T], and [B, A] what is to be said after each of the last A of them."""

    tokens: Tensor
    answers: Tensor


# -- tasks ---------------------------------------------------------------------------------------------------


# Batches are made where their generator is: on a GPU the host waits for nothing.


def random_order(batch: int, number: int, generator: torch.Generator) -> Tensor:
    """[batch, number]: in every row the numbers below `number`, in another order."""
    return torch.rand(batch, number, generator=generator, device=generator.device).argsort(1)


def random_keys(batch: int, number: int, generator: torch.Generator) -> Tensor:
    """[batch, number] different keys a row."""
    return random_order(batch, NUM_KEYS, generator)[:, :number]


def random_tokens(first: int, kinds: int, shape: tuple, generator: torch.Generator) -> Tensor:
    return first + torch.randint(kinds, shape, generator=generator, device=generator.device)


def random_values(batch: int, number: int, generator: torch.Generator) -> Tensor:
    return random_tokens(NUM_KEYS, NUM_VALUES, (batch, number), generator)


def mqar(batch: int, number: int, length: int, generator: torch.Generator) -> Batch:
    """Keys and values in turn, then the keys in another order: 3 * number tokens, whatever the length."""
    keys, values = random_keys(batch, number, generator), random_values(batch, number, generator)
    order = random_order(batch, number, generator)
    tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
    return Batch(tokens, values.gather(1, order))


def needles(batch: int, number: int, length: int, generator: torch.Generator) -> Batch:
    """`number` needles of three tokens in `length` tokens of noise, then the key of one."""
    keys, values = random_keys(batch, number, generator), random_values(batch, number, generator)
    markers = torch.full_like(keys, MARKER)
    tokens = random_tokens(NUM_KEYS + NUM_VALUES, NUM_NOISE, (batch, length), generator)
    places = 3 * random_order(batch, length // 3, generator)[:, :number]
    for offset, part in enumerate((markers, keys, values)):
        tokens.scatter_(1, places + offset, part)
    asked = random_tokens(0, number, (batch, 1), generator)
    return Batch(torch.cat([tokens, markers[:, :1], keys.gather(1, asked)], 1), values.gather(1, asked))


TASKS = {"mqar": mqar, "needle": needles, "multi_needle": needles}


def numbers(task: str, options: argparse.Namespace) -> tuple[int, ...]:
    """Of pairs or needles."""
    return tuple(sorted(options.pairs)) if options.pairs and task != "needle" else PAIRS[task]


class Exercise(NamedTuple):
    """n, and how many tokens of noise."""

    number: int
    length: int


def exercises(task: str, options: argparse.Namespace) -> list[Exercise]:
    """What is trained, the easiest first: few pairs before many, needles in little noise before much."""
    counts, lengths = numbers(task, options), [options.length]
    while task != "mqar" and lengths[0] >= 128:
        lengths.insert(0, lengths[0] // 2)
    return [Exercise(x, length) for length in lengths for x in counts if task == "mqar" or 3 * x <= length]


def exercise_at(step: int, steps: int, exercises: Sequence[Exercise]) -> Exercise:
    """All in turn; harder ones join one after another over the first half of the steps, for from the start
    they would keep a small model from learning anything.
    """
    known = 1 + min(len(exercises) - 1, 2 * len(exercises) * step // steps)
    return exercises[step % known]


def training_batch(
    task: str, exercise: Exercise, options: argparse.Namespace, generator: torch.Generator
) -> Batch:
    """As many tokens in every batch, or nearly so."""
    number, length = exercise
    more = max(numbers(task, options)) / number if task == "mqar" else options.length / length
    return TASKS[task](int(options.batch * more), number, length, generator)


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


def answer_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """[B, A, vocabulary] in float32, from a forward in bfloat16 on a GPU."""
    device_type = batch.tokens.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=device_type == "cuda"):
        return model(batch.tokens, logits_to_keep=batch.answers.shape[1]).logits.float()


# -- training ------------------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Of step 0 .. steps - 1: it rises linearly over a tenth of them, then falls along a cosine towards 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


class Trainer:
    """Steps of a model: forward, backward, clipping of the gradients, AdamW.

    With graphs a step is one CUDA graph per shape of a batch, and the host only writes the batch and the
    learning rate to where the graph reads them: without, launching the kernels of so small a model takes
    longer than running them. What is computed is the same.

    Args:
        model: trained in place; its parameters keep their addresses.
        examples: with graphs a batch of every shape there is, which are overwritten; training does not depend
            on what is in them.
        steps, lr: of the whole training, and the peak of the learning rate.
    """

    def __init__(
        self, model: torch.nn.Module, examples: Iterable[Batch], steps: int, lr: float, graphs: bool
    ):
        self.model, self.parameters = model, list(model.parameters())
        self.steps, self.peak_lr, self.num_steps = steps, lr, 0
        device = self.parameters[0].device
        self.lr, self.loss = torch.tensor(lr, device=device), torch.zeros((), device=device)
        decayed = [x for x in self.parameters if x.dim() > 1]
        others = [x for x in self.parameters if x.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr, betas=(0.9, 0.95), fused=device.type == "cuda", capturable=graphs,
        )  # fmt: skip
        self.graphs = self._capture(examples) if graphs else None

    def step(self, batch: Batch) -> Tensor:
        """Returns the loss, mean nats an answer, in memory that the next step writes to."""
        self.lr.fill_(learning_rate(self.num_steps, self.steps, self.peak_lr))
        self.num_steps += 1
        if self.graphs is None:
            self._train(batch)
        else:
            graph, inputs = self.graphs[batch.tokens.shape]
            for x, new in zip(inputs, batch, strict=True):
                x.copy_(new)
            graph.replay()
        return self.loss

    def _train(self, batch: Batch) -> None:
        """A step at self.lr. Gradients live in here only: graphs that share memory share theirs."""
        logits = answer_logits(self.model, batch)
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss.copy_(loss.detach())

    def _capture(self, examples: Iterable[Batch]) -> dict[torch.Size, tuple[torch.cuda.CUDAGraph, Batch]]:
        """By shape of the tokens, the graph of a step and the batch that it reads."""
        initial = [x.detach().clone() for x in self.parameters]
        stream, pool, graphs = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), {}
        for shape, batch in {x.tokens.shape: x for x in examples}.items():
            stream.wait_stream(torch.cuda.current_stream())
            # Before the capture, what is compiled must be, and AdamW have its state. On the capture's stream,
            # since autograd may go on using the one that it has seen first.
            with torch.cuda.stream(stream), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                for _ in range(3):
                    self._train(batch)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._train(batch)
            graphs[shape] = graph, batch
        with torch.no_grad():  # the steps above were none
            for x, value in zip(self.parameters, initial, strict=True):
                x.copy_(value)
        for state in self.optimizer.state.values():
            for x in state.values():
                x.zero_()
        return graphs


def train(run: Run, options: argparse.Namespace, graphs: bool) -> tuple[GatedDeltaNet2ForCausalLM, Tensor]:
    """The model, and the loss of every step, [steps]."""
    device, all_exercises = torch.device(options.device), exercises(run.task, options)
    torch.manual_seed(run.seed)
    model = GatedDeltaNet2ForCausalLM(make_config(run.variant, options)).to(device).train()
    examples = (training_batch(run.task, x, options, torch.Generator(device)) for x in all_exercises)
    trainer = Trainer(model, examples, options.steps, options.lr, graphs)
    generator = torch.Generator(device).manual_seed(run.seed)
    losses = torch.empty(options.steps, device=device)
    for step in range(options.steps):
        exercise = exercise_at(step, options.steps, all_exercises)
        batch = training_batch(run.task, exercise, options, generator)
        losses[step] = trainer.step(batch)
    return model, losses


@torch.no_grad()
def score(model: GatedDeltaNet2ForCausalLM, run: Run, options: argparse.Namespace) -> dict[int, float]:
    """Accuracy for every number of pairs or needles."""
    generator = torch.Generator(options.device).manual_seed(2**31 + run.seed)
    accuracy = {}
    for number in numbers(run.task, options):
        right = 0.0
        for _ in range(options.test_batches):
            batch = TASKS[run.task](options.batch, number, options.length, generator)
            right += (answer_logits(model, batch).argmax(-1) == batch.answers).float().mean()
        accuracy[number] = right.item() / options.test_batches
    return accuracy


def train_and_score(run: Run, options: argparse.Namespace) -> dict:
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    model, losses = train(run, options, graphs=options.device == "cuda")
    accuracy, config = score(model.eval(), run, options), model.config
    return {
        **run._asdict(),
        "parameters": num_parameters(config),
        "state": config.num_hidden_layers * config.num_heads * config.head_dim**2,
        "final_loss": losses[-1].item(),
        "seconds": time.perf_counter() - begin,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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


def provenance(options: argparse.Namespace) -> dict:
    """What all runs of a folder have in common."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    others = ("out", "jobs", "threads", "budget", "tasks", "variants", "seeds")
    arguments = {name: value for name, value in vars(options).items() if name not in others}
    return {"device": device, "torch": torch.__version__, "options": arguments}


def recorded(options: argparse.Namespace) -> list[dict]:
    """The runs that the folder has already; SystemExit where they are of another device or other options."""
    path = options.out / "recall.json"
    if not path.is_file():
        return []
    record = json.loads(path.read_text())
    runs = record.pop("runs")
    record.pop("date", None)
    if record != provenance(options):
        raise SystemExit(
            f"{path} has runs of {record}, and these are of {provenance(options)}: another --out?"
        )
    for result in runs:
        result["accuracy"] = {int(n): x for n, x in result["accuracy"].items()}
    return runs


def save(results: list[dict], options: argparse.Namespace) -> str:
    """Writes what there is so far, and gives the table."""
    results = sorted(results, key=lambda x: (x["task"], x["variant"], x["seed"]))
    rows, folder = means(results), options.out
    newest = max(x.get("date", "") for x in results)
    record = {**provenance(options), "date": newest, "runs": results}
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
    parser.add_argument("--budget", type=float, help="seconds after which no model is begun")
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
    results = recorded(options)
    done = {Run(x["task"], x["variant"], x["seed"]) for x in results}
    runs = [Run(t, v, s) for s in options.seeds for t in options.tasks for v in options.variants]
    progress = tqdm(total=len(runs), initial=len(done & set(runs)), unit="model", file=sys.stderr)
    runs = [run for run in runs if run not in done]
    end = math.inf if options.budget is None else time.monotonic() + options.budget

    def add(result: dict) -> None:
        results.append(result)
        save(results, options)
        scores = " ".join(f"{n}:{100 * x:.0f}%" for n, x in result["accuracy"].items())
        progress.write(
            f"{result['task']} {result['variant']} seed {result['seed']}: {scores}", file=sys.stderr
        )
        progress.update()

    if options.jobs == 1:
        while runs and time.monotonic() < end:
            add(train_and_score(runs.pop(0), options))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            training: set[Future] = set()
            while training or (runs and time.monotonic() < end):
                while runs and len(training) < options.jobs and time.monotonic() < end:
                    training.add(pool.submit(train_and_score, runs.pop(0), options))
                ready, training = wait(training, return_when=FIRST_COMPLETED)
                for result in ready:
                    add(result.result())
    progress.close()
    if runs:
        print(f"{len(runs)} models are left: run this again", file=sys.stderr)
    if not results:
        return 0
    plot(means(results), options.out / "recall.png")
    print(save(results, options), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
