"""What a run says while it trains: a progress bar, a JSONL file, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm


class Log:
    """Of the first process; those of others say nothing.

    `log.jsonl` has a line for every update, {"step", "tokens", "loss", "lr", "grad_norm",
    "tokens_per_second"}, and one for every evaluation, {"step", "eval_loss", "perplexity"}. A resumed run
    first drops the lines of updates after its checkpoint: the file reads as if nothing had happened.
    """

    def __init__(self, output: Path, step: int, tokens: int, total_tokens: int, tensorboard: bool):
        path = output / "log.jsonl"
        _truncate(path, step)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self._progress = tqdm(
            desc="training",
            initial=tokens,
            total=total_tokens,
            unit=" tokens",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )

    def update(
        self, step: int, tokens: int, loss: float, lr: float, grad_norm: float, tokens_per_second: float
    ) -> None:
        scalars = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_per_second": tokens_per_second}
        self._write({"step": step, "tokens": tokens, **scalars})
        self._scalars("train", scalars, step)
        self._progress.set_postfix_str(f"update {step}, loss {loss:.4f}, lr {lr:.2e}", refresh=False)
        self._progress.update(tokens - self._progress.n)

    def evaluation(self, step: int, loss: float) -> None:
        perplexity = math.exp(min(loss, 700.0))
        self._write({"step": step, "eval_loss": loss, "perplexity": perplexity})
        self._scalars("eval", {"loss": loss, "perplexity": perplexity}, step)
        self.say(f"update {step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f}")

    def say(self, text: str) -> None:
        self._progress.write(text)

    def close(self) -> None:
        self._progress.close()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def _scalars(self, group: str, scalars: dict[str, float], step: int) -> None:
        if self._tensorboard:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(f"{group}/{name}", value, step)


def _truncate(path: Path, step: int) -> None:
    """Keeps the lines up to `step`, without one that a killed run left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    shorter = path.with_suffix(".shorter")
    shorter.write_text("".join(kept), encoding="utf-8")
    os.replace(shorter, path)
