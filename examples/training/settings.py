"""What the user asks for: the command line, and the checks that need nothing but it."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch


class Refusal(Exception):
    """A configuration that cannot be trained, in one line. The exit status is 2."""


@dataclass(frozen=True)
class Settings:
    """The command line, by the names of its options."""

    output: Path
    resume: bool
    seed: int
    # data
    files: list[str] | None
    dataset: str | None
    dataset_config: str | None
    dataset_split: str
    text_field: str
    eval_files: list[str] | None
    eval_split: str | None
    eval_sequences: int
    data_tokens: int | None
    tokenizer: str
    cache: Path | None
    # model
    config: str
    layers: int | None
    overrides: dict
    # optimisation
    seq_len: int
    batch: int
    micro_batch: int
    tokens: int | None
    lr: float
    min_lr_ratio: float
    warmup_tokens: int | None
    weight_decay: float
    clip: float
    # how it runs
    device: str
    parallel: str
    autocast: bool
    compile: bool
    gradient_checkpointing: bool
    deterministic: bool
    # what it leaves
    eval_every: int
    save_every: int
    keep: int
    tensorboard: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(message)


def parse(arguments: list[str] | None, description: str) -> Settings:
    parser = _Parser(
        prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoints and logs")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint there, if there is one"
    )
    parser.add_argument("--seed", type=_count, default=0, help="of weights, order of the data, and dropout")

    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--files",
        nargs="+",
        metavar="PATTERN",
        help="paths or globs: *.jsonl holds a document a line, any other file is one document of UTF-8 text",
    )
    source.add_argument("--dataset", metavar="NAME", help="for `datasets`: a name on the Hub, or a folder")
    data.add_argument("--dataset-config", metavar="NAME", help="of --dataset")
    data.add_argument("--dataset-split", metavar="NAME", default="train", help="of --dataset; %(default)s")
    data.add_argument(
        "--text-field", metavar="NAME", default="text", help="of datasets and jsonl; %(default)s"
    )
    data.add_argument(
        "--eval-files", nargs="+", metavar="PATTERN", help="held-out files, instead of the end of the data"
    )
    data.add_argument("--eval-split", metavar="NAME", help="held-out split of --dataset, instead of its end")
    data.add_argument(
        "--eval-sequences", type=_count, default=64, help="how many are held out, 0: none; %(default)s"
    )
    data.add_argument("--data-tokens", type=_count, help="read no more than so many tokens of the data")
    data.add_argument(
        "--tokenizer", default="bytes", help="name or path for AutoTokenizer, or bytes: 256 and EOS (default)"
    )
    data.add_argument("--cache", type=Path, help="folder of tokenised data; OUTPUT/tokens")

    model = parser.add_argument_group("model, with the tokenizer's vocab_size, up to a multiple of 64")
    model.add_argument(
        "--config", required=True, help="config.json, a folder with one, or a name: 1.3b, 1.3b-hybrid, tiny"
    )
    model.add_argument("--layers", type=_count, help="instead of the config's num_hidden_layers")
    model.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another field of the config, its value in JSON; may be given again",
    )

    optimisation = parser.add_argument_group("optimisation (AdamW, betas 0.9 and 0.95)")
    optimisation.add_argument("--seq-len", type=_count, default=2048, help="%(default)s")
    optimisation.add_argument("--batch", type=_count, default=64, help="sequences per update; %(default)s")
    optimisation.add_argument(
        "--micro-batch", type=_count, default=8, help="sequences at once on each device; %(default)s"
    )
    optimisation.add_argument("--tokens", type=_count, help="to train on; by default the data once")
    optimisation.add_argument("--lr", type=float, default=4e-4, help="the highest one; %(default)s")
    optimisation.add_argument(
        "--min-lr-ratio", type=float, default=0.1, help="the cosine's end, of --lr; %(default)s"
    )
    optimisation.add_argument("--warmup-tokens", type=_count, help="by default 1%% of --tokens")
    optimisation.add_argument("--weight-decay", type=float, default=0.1, help="of matrices; %(default)s")
    optimisation.add_argument("--clip", type=float, default=1.0, help="norm of the gradient; %(default)s")

    how = parser.add_argument_group("how it runs")
    how.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    how.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp", help="under torchrun; %(default)s")
    how.add_argument(
        "--autocast", action=argparse.BooleanOptionalAction, help="bfloat16; by default on a GPU only"
    )
    how.add_argument("--compile", action="store_true", help="torch.compile every layer")
    how.add_argument("--gradient-checkpointing", action="store_true")
    how.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="deterministic algorithms of PyTorch, so that a resumed run has the same bits; default: yes",
    )

    leaves = parser.add_argument_group("what it leaves")
    leaves.add_argument("--eval-every", type=_count, default=500, help="updates; %(default)s")
    leaves.add_argument("--save-every", type=_count, default=500, help="updates; %(default)s")
    leaves.add_argument("--keep", type=_count, default=3, help="newest checkpoints, 0: all; %(default)s")
    leaves.add_argument("--tensorboard", action="store_true", help="scalars in OUTPUT/tensorboard")

    options = vars(parser.parse_args(arguments))
    options["overrides"] = dict(_override(text) for text in options["overrides"])
    if options["autocast"] is None:
        options["autocast"] = options["device"] == "cuda"
    return Settings(**options)


def _count(text: str) -> int:
    """500, 20_000 or 1e9."""
    try:
        number = int(text)
    except ValueError:
        number = float(text)
    if number != number or number < 0 or not math.isfinite(number) or number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return int(number)


_count.__name__ = "number"  # in argparse's message


def _override(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise Refusal(f"--set: expected KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def check(settings: Settings, processes: int) -> None:
    """Everything that the command line alone tells, before anything is read or made."""
    if settings.seq_len < 2:
        raise Refusal(f"--seq-len: expected at least 2, one token to predict, got {settings.seq_len}")
    for name in ("batch", "micro_batch", "eval_every", "save_every"):
        if getattr(settings, name) < 1:
            raise Refusal(f"--{name.replace('_', '-')}: expected at least 1, got 0")
    for name in ("layers", "tokens", "data_tokens"):
        if getattr(settings, name) == 0:
            raise Refusal(f"--{name.replace('_', '-')}: expected at least 1, got 0")
    for name in ("lr", "clip"):
        if not 0 < getattr(settings, name) < math.inf:
            raise Refusal(f"--{name}: expected a positive number, got {getattr(settings, name)}")
    if not 0 <= settings.weight_decay < math.inf:
        raise Refusal(f"--weight-decay: expected a number of at least 0, got {settings.weight_decay}")
    if not 0 <= settings.min_lr_ratio <= 1:
        raise Refusal(f"--min-lr-ratio: expected 0 to 1, got {settings.min_lr_ratio}")
    if settings.tokens and settings.warmup_tokens and settings.warmup_tokens >= settings.tokens:
        raise Refusal(
            f"--warmup-tokens: expected fewer than --tokens {settings.tokens}, got {settings.warmup_tokens}"
        )
    if settings.batch % (settings.micro_batch * processes):
        raise Refusal(
            f"--batch: expected a multiple of --micro-batch {settings.micro_batch} times {processes} "
            f"process{'es' * (processes > 1)}, got {settings.batch}"
        )
    if settings.layers and "num_hidden_layers" in settings.overrides:
        raise Refusal("--layers and --set num_hidden_layers=... say the same: give one of them")
    _check_data_options(settings)
    if settings.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise Refusal("--tensorboard: the package tensorboard is not installed")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch sees no GPU")


def _check_data_options(settings: Settings) -> None:
    if settings.dataset is None and (settings.dataset_config or settings.eval_split):
        raise Refusal("--dataset-config and --eval-split: of --dataset, which is not given")
    if settings.eval_files and settings.eval_split:
        raise Refusal("--eval-files and --eval-split: give one of them")
    if (settings.eval_files or settings.eval_split) and not settings.eval_sequences:
        raise Refusal("--eval-sequences 0: nothing would be read of --eval-files or --eval-split")
    if settings.dataset is not None and not importlib.util.find_spec("datasets"):
        raise Refusal("--dataset: the package datasets is not installed")
    for name in ("files", "eval_files"):
        for pattern in getattr(settings, name) or []:
            if not matching_files(pattern):
                raise Refusal(f"--{name.replace('_', '-')}: there is no file {pattern}")


def matching_files(pattern: str) -> list[Path]:
    """The files of a path or glob, sorted; a path that exists is no glob, whatever it is called."""
    found = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
    return [Path(path) for path in found if Path(path).is_file()]
