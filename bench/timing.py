"""Times on a GPU: medians and spread of calls that take turns, and peak memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch


class Time(NamedTuple):
    """Milliseconds: median, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


def alternate(calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 5) -> dict[str, Time]:
    """Every call `repeats` times, one after the other in turn, each between two events.

    Nobody waits for the GPU in between, as in a training loop: a call's host time counts where it is longer
    than what the GPU still has to do.
    """
    events = {name: [(_event(), _event()) for _ in range(repeats)] for name in calls}
    for _ in range(warmup):
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    for turn in range(repeats):
        for name, call in calls.items():
            begin, end = events[name][turn]
            begin.record()
            call()
            end.record()
    torch.cuda.synchronize()
    return {name: _summary([begin.elapsed_time(end) for begin, end in x]) for name, x in events.items()}


def in_a_row(call: Callable[[], object], number: int, repeats: int) -> Time:
    """Of a call among `number` that follow each other without events, which take the host's time."""

    def row() -> None:
        for _ in range(number):
            call()

    return Time(*(x / number for x in alternate({"row": row}, repeats)["row"]))


def _event() -> torch.cuda.Event:
    """Recorded once, for it is made when it is first recorded, which takes longer than a short call."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _summary(values: list[float]) -> Time:
    deciles = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return Time(statistics.median(values), deciles[0], deciles[-1])


def captured(call: Callable[[], object]) -> Callable[[], None] | None:
    """The call as a CUDA graph's replay; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except Exception as error:  # whatever a foreign op raises while it is captured
        print(f"    not captured: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return graph.replay


def eager_and_graphs(
    calls: dict[str, Callable[[], object]], repeats: int, warmup: int = 5
) -> tuple[dict[str, Time], dict[str, Time]]:
    """Of calls that take turns, and of their CUDA graphs, as far as they can be captured."""
    eager = alternate(calls, repeats, warmup)
    graphs = {name: replay for name, call in calls.items() if (replay := captured(call))}
    return eager, alternate(graphs, repeats) if graphs else {}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that is allocated while the call runs, beyond what was before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def copy_terabytes_per_second(num_bytes: int = 1 << 31) -> float:
    """A large device-to-device copy, bytes read and bytes written."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    time = alternate({"copy": lambda: target.copy_(source)}, repeats=10)["copy"].median
    return 2 * num_bytes / (time * 1e9)
