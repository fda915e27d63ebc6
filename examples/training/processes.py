"""The processes that train together: one, or those that torchrun starts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .settings import Refusal, Settings

Result = TypeVar("Result")


def expected_processes() -> int:
    """How many torchrun starts; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Processes:
    rank: int
    size: int
    device: torch.device
    patient: dist.ProcessGroup | None  # for waiting while the first process reads the data; None: no torchrun

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.patient is not None

    def mean(self, x: Tensor) -> Tensor:
        """Of x over all processes, on all of them."""
        if self.distributed:
            dist.all_reduce(x)
            x /= self.size
        return x

    def wait(self) -> None:
        if self.distributed:
            dist.barrier(group=self.patient)

    def on_first(self, work: Callable[[], Result]) -> Result:
        """work() of the first process: its result, or its Refusal, in all of them."""
        outcome: list = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Refusal as refusal:
                outcome[1] = str(refusal)
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0, group=self.patient)
        if outcome[1] is not None:
            raise Refusal(outcome[1])
        return outcome[0]


@contextlib.contextmanager
def started(settings: Settings) -> Iterator[Processes]:
    """The process groups, from here to the end of the block."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if settings.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise Refusal(
                f"--device cuda: process {local_rank} of this host has no GPU, there are "
                f"{torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        if settings.parallel == "fsdp":
            raise Refusal("--parallel fsdp: start it with torchrun")
        yield Processes(0, 1, device, None)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=2))
        yield Processes(dist.get_rank(), dist.get_world_size(), device, patient)
    finally:
        dist.destroy_process_group()
