"""A training run: what is checked and made before it, and the updates."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR

from . import checkpoints, data
from .checkpoints import Checkpoints
from .logs import Log
from .model import ParallelModel, comparable, make_config, make_model
from .processes import Processes
from .schedule import WarmupCosine, make_optimizer, names_with_decay
from .settings import Refusal, Settings

# A resumed run shares these with the run that it goes on with, or it would be another run.
SAME = (
    "seq_len", "batch", "micro_batch", "seed", "tokens", "lr", "min_lr_ratio", "warmup_tokens",
    "weight_decay", "clip", "autocast", "eval_sequences",
)  # fmt: skip
# These may change; the losses are then the same to rounding only.
SAME_FOR_THE_SAME_BITS = ("parallel", "device", "compile", "gradient_checkpointing", "deterministic")


class Diverged(Exception):
    """A loss or gradient that is not finite."""


@dataclass(frozen=True)
class Plan:
    """What the first process finds out before anything large starts; the same in all processes."""

    config: transformers.PretrainedConfig
    tokenizer: data.Bytes | data.Pretrained
    corpus: Path
    eval_corpus: Path | None
    run: dict  # for training.json: what a resumed run is compared with
    resumed: Path | None


def make_plan(settings: Settings, processes: int) -> Plan:
    """Refuses what cannot work, then tokenises. In the first process."""
    tokenizer = data.make_tokenizer(settings.tokenizer)
    config = make_config(settings, tokenizer.size, tokenizer.eos)
    with torch.device("meta"):
        make_model(config, settings)  # the model's own complaints
    source, eval_source = data.sources(settings)
    held_out = settings.eval_sequences * settings.seq_len
    run = {name: getattr(settings, name) for name in SAME + SAME_FOR_THE_SAME_BITS}
    run |= {
        "processes": processes,
        "data": data.corpus_key(source, tokenizer, settings.data_tokens),
        "eval_data": eval_source and data.corpus_key(eval_source, tokenizer, held_out),
        "tokenizer": settings.tokenizer,
        "model": comparable(config),
    }
    _check_writable(settings.output, "--output")
    cache = settings.cache or settings.output / "tokens"
    _check_writable(cache, "--cache")
    resumed = _find_checkpoint(settings, run)
    corpus = data.tokenised(source, tokenizer, settings.data_tokens, cache, "data")
    eval_corpus = eval_source and data.tokenised(eval_source, tokenizer, held_out, cache, "held-out data")
    return Plan(config, tokenizer, corpus, eval_corpus, run, resumed)


def _check_writable(folder: Path, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Refusal(f"{option} {folder}: cannot write there ({error.strerror})") from error


def _find_checkpoint(settings: Settings, run: dict) -> Path | None:
    newest = (checkpoints.complete(settings.output / "checkpoints") or [None])[-1]
    if newest is None:
        return None
    if not settings.resume:
        raise Refusal(f"--output {settings.output}: has checkpoints; go on with --resume, or choose another")
    try:
        saved = checkpoints.read_training(newest)["run"]
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(f"--resume: {newest / 'training.json'} cannot be read ({error})") from error
    differences = [
        f"{name} was {saved.get(name)}, is {run[name]}" for name in SAME if saved.get(name) != run[name]
    ]
    if any(saved.get(name) != run[name] for name in ("data", "eval_data", "tokenizer")):
        differences.append("the data changed (names, sizes or times of files, or the tokenizer)")
    before, now = saved.get("model", {}), run["model"]
    differences += [
        f"the model's {key} was {before[key]}, is {now[key]}"
        for key in before.keys() & now.keys()
        if before[key] != now[key]
    ]
    if differences:
        raise Refusal(f"--resume: {newest.name} is of another run: {'; '.join(sorted(differences))}")
    return newest


def _open_sequences(settings: Settings, plan: Plan) -> tuple[data.Sequences, data.Sequences]:
    """To train on, and held out."""
    seq_len, held_out = settings.seq_len, settings.eval_sequences
    sequences = data.Sequences(plan.corpus, seq_len)
    number = len(sequences)
    if plan.eval_corpus:
        evaluation = data.Sequences(plan.eval_corpus, seq_len)
        if not len(evaluation):
            raise Refusal(f"the held-out data have fewer than --seq-len {seq_len} tokens")
    else:
        evaluation = data.Sequences(plan.corpus, seq_len, max(0, number - held_out))
        sequences = data.Sequences(plan.corpus, seq_len, 0, max(0, number - held_out))
    if not len(sequences):
        raise Refusal(
            f"the data have {number} sequences of --seq-len {seq_len} tokens: too few for "
            f"--eval-sequences {held_out} and training"
        )
    if settings.tokens is None and len(sequences) < settings.batch:
        raise Refusal(
            f"the data have {len(sequences)} sequences to train on, fewer than --batch {settings.batch}: "
            "say with --tokens how long to train on them"
        )
    return sequences, evaluation


def train(settings: Settings, processes: Processes) -> None:
    plan = processes.on_first(lambda: make_plan(settings, processes.size))
    sequences, evaluation = _open_sequences(settings, plan)
    Run(settings, plan, sequences, evaluation, processes).train()


class Run:
    """The model, its optimizer and where they are in the data."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        sequences: data.Sequences,
        evaluation: data.Sequences,
        processes: Processes,
    ):
        self.settings, self.plan, self.processes = settings, plan, processes
        self.sequences, self.evaluation = sequences, evaluation
        self.order = data.ShuffledOrder(len(sequences), settings.seed)
        self.tokens_per_update = settings.batch * settings.seq_len
        tokens = settings.tokens or len(sequences) // settings.batch * self.tokens_per_update
        self.updates = -(-tokens // self.tokens_per_update)
        total = self.updates * self.tokens_per_update
        warmup = total // 100 if settings.warmup_tokens is None else settings.warmup_tokens
        if warmup >= total:
            raise Refusal(f"--warmup-tokens: expected fewer than the {total} to train on, got {warmup}")
        self.accumulated = settings.batch // (settings.micro_batch * processes.size)
        self.checkpoints = Checkpoints(
            settings.output / "checkpoints", settings.keep, plan.tokenizer, processes
        )
        self.saved = plan.resumed
        before = checkpoints.read_training(self.saved) if self.saved else {}
        self.step = before.get("step", 0)

        bare = make_model(plan.config, settings)
        if self.saved:
            checkpoints.load_weights(bare, self.saved)
        with_decay = names_with_decay(bare)
        self.parameters = sum(parameter.numel() for parameter in bare.parameters())
        self.model = ParallelModel(bare, settings, processes)
        self.optimizer = make_optimizer(
            self.model.bare, with_decay, settings.lr, settings.weight_decay, processes.device.type == "cuda"
        )
        self.scheduler = LambdaLR(
            self.optimizer, WarmupCosine(self.tokens_per_update, warmup, total, settings.min_lr_ratio)
        )
        if self.saved:
            checkpoints.load_optimizer(self.model.bare, self.optimizer, self.saved)
            self.scheduler.load_state_dict(before["scheduler"])
        self.model.warm_up(self._micro_batch(self.step, 0))
        torch.manual_seed(settings.seed + processes.rank + 1)
        if self.saved:
            checkpoints.load_random_state(self.saved, processes)

    def train(self) -> None:
        if self.processes.first:
            self.checkpoints.remove_unfinished()
            self._describe()
        with self._log() as log:
            while self.step < self.updates:
                begin = time.perf_counter()
                lr = self.scheduler.get_last_lr()[0]
                loss, grad_norm = self._update()
                self.step += 1
                if log:
                    speed = self.tokens_per_update / (time.perf_counter() - begin)
                    log.update(self.step, self.step * self.tokens_per_update, loss, lr, grad_norm, speed)
                self._at_times(log)
        if self.processes.first:
            print(f"done: the model is in {self.saved}")

    def _update(self) -> tuple[float, float]:
        """One step of the optimizer: the mean loss of its batch, and the norm of the gradient."""
        total = torch.zeros((), device=self.processes.device)
        for part in range(self.accumulated):
            tokens = self._micro_batch(self.step, part)
            with self.model.synchronised(last=part == self.accumulated - 1):
                loss = self.model.loss(tokens) / self.accumulated
                loss.backward()
            total += loss.detach()
        loss = float(self.processes.mean(total))
        grad_norm = self.model.clip(self.settings.clip)
        for name, value in (("loss", loss), ("norm of the gradient", grad_norm)):
            if not math.isfinite(value):
                raise Diverged(
                    f"the {name} of update {self.step + 1} is {value}: stopped before it changes the model; "
                    f"the newest checkpoint is {self.saved or 'none'}"
                )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return loss, grad_norm

    def _micro_batch(self, step: int, part: int) -> torch.Tensor:
        """[micro_batch, seq_len]: of the batch of an update, part after part, and in a part rank after rank.

        So the sequences of an update are the same for any number of processes.
        """
        begin = step * self.settings.batch
        begin += (part * self.processes.size + self.processes.rank) * self.settings.micro_batch
        numbers = self.order(begin, begin + self.settings.micro_batch)
        return self.sequences.read(numbers, self.processes.device)

    def _at_times(self, log: Log | None) -> None:
        """Evaluation and checkpoint, where their times have come."""
        last = self.step == self.updates
        if len(self.evaluation) and (last or self.step % self.settings.eval_every == 0):
            loss = self.model.evaluate(self.evaluation, self.settings.micro_batch, self.processes)
            if log:
                log.evaluation(self.step, loss)
        if last or self.step % self.settings.save_every == 0:
            if not self.model.is_finite(self.processes):
                raise Diverged(
                    f"weights are not finite after update {self.step}, which is not saved; the newest "
                    f"checkpoint is {self.saved or 'none'}"
                )
            training = {
                "step": self.step,
                "tokens": self.step * self.tokens_per_update,
                "sequences": self.step * self.settings.batch,
                "scheduler": self.scheduler.state_dict(),
                "run": self.plan.run,
            }
            self.saved = self.checkpoints.save(self.model.bare, self.optimizer, training)

    @contextlib.contextmanager
    def _log(self) -> Iterator[Log | None]:
        """Of the first process; None in others."""
        if not self.processes.first:
            yield None
            return
        per_update = self.tokens_per_update
        log = Log(
            self.settings.output,
            self.step,
            self.step * per_update,
            self.updates * per_update,
            self.settings.tensorboard,
        )
        try:
            yield log
        finally:
            log.close()

    def _describe(self) -> None:
        settings, processes = self.settings, self.processes
        print(
            f"{self.plan.config.model_type}, {self.parameters:,} parameters, "
            f"{len(self.sequences)} sequences of {settings.seq_len} tokens to train on, "
            f"{len(self.evaluation)} held out; {self.updates} updates of {settings.batch} sequences: "
            f"{self.accumulated} of {settings.micro_batch} on each of {processes.size} "
            f"{processes.device.type}"
        )
        if self.saved:
            print(f"resumed from {self.saved}")
            before = checkpoints.read_training(self.saved)["run"]
            changed = [
                name for name in (*SAME_FOR_THE_SAME_BITS, "processes") if before[name] != self.plan.run[name]
            ]
            if changed:
                print(f"{', '.join(changed)} changed: losses are the same to rounding, not bit for bit")
        elif settings.resume:
            print("nothing to resume from: starts from the beginning")
