"""The torch backend against what one would write without it: autograd through the token recurrence.

Promised on two CPU cores at T 4096, H 4, K = V = 128, forward and backward together: a tenth of the time and
a quarter of the memory. The recurrence takes tens of seconds there, so it is measured at T 1024 and scaled by
four. That favours it: its time grows faster than linearly, since the gradient of every x[:, t] is as long as
x. Both run on one thread and are measured in processor time, so that other processes hardly matter.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gdn2_ext
from gdn2_ext.torch_backend import token_step

SEQLEN, MEASURED_SEQLEN = 4096, 1024
HEADS, DIM = 4, 128


def token_by_token(q, k, v, g, b, w) -> torch.Tensor:
    S = q.new_zeros(q.shape[0], HEADS, DIM, DIM)
    outputs = []
    for t in range(q.shape[1]):
        S, o = token_step(S, DIM**-0.5 * q[:, t], k[:, t], v[:, t], g[:, t], b[:, t], w[:, t])
        outputs.append(o)
    return torch.stack(outputs, dim=1)


def in_chunks(*tensors) -> torch.Tensor:
    return gdn2_ext.chunk_gdn2(*tensors, backend="torch")[0]


WAYS = {"token_by_token": token_by_token, "in_chunks": in_chunks}


def resident_memory(which: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most since it started."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(which))
    return 1024 * int(line.split()[1])


def measure(way: str, seqlen: int) -> dict[str, float]:
    """Seconds, and bytes beyond the inputs, of a forward and backward. Meant for a process of its own."""
    import cases

    torch.set_num_threads(1)

    def leaves(seqlen: int) -> list[torch.Tensor]:
        inputs = cases.make_inputs("slow", seqlen=seqlen, heads=HEADS, dim_k=DIM, dim_v=DIM)
        return [x.requires_grad_() for x in inputs.tensors]

    def step(tensors: list[torch.Tensor]) -> float:
        start = time.process_time()
        WAYS[way](*tensors).sum().backward()
        return time.process_time() - start

    step(leaves(64))  # loads what is loaded at first use
    tensors = leaves(seqlen)
    before = resident_memory("VmRSS")
    # Making the inputs may have taken more for a moment: from here on the kernel counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    seconds = step(tensors)
    bytes_beyond_inputs = resident_memory("VmHWM") - before
    for _ in range(0 if way == "token_by_token" else 2):
        seconds = min(seconds, step(tensors))
    return {"seconds": seconds, "bytes": bytes_beyond_inputs}


def measure_in_a_process_of_its_own(way: str, seqlen: int) -> dict[str, float]:
    command = [sys.executable, __file__, way, str(seqlen)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_a_tenth_of_the_time_and_a_quarter_of_the_memory_of_autograd_through_the_recurrence():
    scale = SEQLEN / MEASURED_SEQLEN
    recurrence = measure_in_a_process_of_its_own("token_by_token", MEASURED_SEQLEN)
    chunks = measure_in_a_process_of_its_own("in_chunks", SEQLEN)
    print(f"token by token at T = {MEASURED_SEQLEN}: {recurrence}, in chunks at T = {SEQLEN}: {chunks}")
    assert chunks["seconds"] * 10 <= recurrence["seconds"] * scale
    assert chunks["bytes"] * 4 <= recurrence["bytes"] * scale


def test_the_two_ways_that_are_compared_compute_the_same(seed):
    import cases
    import compare

    inputs = cases.make_inputs("slow", seqlen=70, heads=HEADS, dim_k=DIM, dim_v=DIM, seed=seed)
    compare.assert_close(in_chunks(*inputs.tensors), token_by_token(*inputs.tensors), 2e-5, "o")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
