"""Trains a causal language model on text: `python examples/train.py --help`, `pip install .[train]`.

    python examples/train.py --files 'books/*.txt' --config tiny --seq-len 256 --output runs/books
    torchrun --nproc-per-node 8 examples/train.py --parallel fsdp --config 1.3b --seq-len 4096 --batch 128 \\
        --dataset HuggingFaceFW/fineweb-edu --dataset-config sample-10BT --tokenizer gpt2 --tokens 10e9 \\
        --output runs/1.3b

The text is tokenised once. Its documents, each followed by EOS, stand one after the other and are cut into
sequences of equal length, in another order in every epoch. A run killed at any point and started again with
--resume has the losses that it would have had, bit for bit with as many devices of the same kind.

OUTPUT holds checkpoints/step-*, each for `AutoModelForCausalLM.from_pretrained`, log.jsonl with every loss,
and the tokens. It has to be where every process can read and write. The exit status is 2 for a configuration
that is refused, 1 for a loss that is not finite.
"""

from __future__ import annotations

import os
import sys

from training import processes
from training.settings import Refusal, Settings, check, parse


def main(arguments: list[str] | None = None) -> int:
    try:
        settings = parse(arguments, __doc__)
        check(settings, processes.expected_processes())
        with processes.started(settings) as group:
            return _train(settings, group)
    except Refusal as refusal:
        if processes.is_first_process():
            print(f"train.py: error: {refusal}", file=sys.stderr)
        return 2


def _train(settings: Settings, group: processes.Processes) -> int:
    _set_up_torch(settings)
    from training import loop  # with transformers: not for --help and the first checks

    try:
        loop.train(settings, group)
    except loop.Diverged as diverged:
        if group.first:
            print(f"train.py: stopped: {diverged}", file=sys.stderr)
        return 1
    return 0


def _set_up_torch(settings: Settings) -> None:
    import torch

    torch.set_float32_matmul_precision("high")
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # what is read here has been written


if __name__ == "__main__":
    sys.exit(main())
