"""Training with the kernels: a small model on a recall task, beside the same model on the torch backend."""

import math

import compare
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gdn2_ext

NUM_KEYS, NUM_VALUES, NUM_PAIRS, BATCH = 64, 16, 24, 64
STEPS = 300


class Layer(nn.Module):
    """Gated DeltaNet-2 between linears, everything else of the block left out."""

    def __init__(self, width: int, heads: int, dim: int, backend: str):
        super().__init__()
        self.shape, self.backend = (heads, dim), backend
        self.norm = nn.RMSNorm(width)
        self.projections = nn.ModuleDict({x: nn.Linear(width, heads * dim) for x in "qkvgbw"})
        nn.init.constant_(self.projections["g"].bias, -4.0)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v, g, b, w = (self.projections[name](y).unflatten(-1, self.shape) for name in "qkvgbw")
        o, _ = gdn2_ext.chunk_gdn2(
            q, k, v, g, b, w, A_log=self.A_log, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_gate_sigmoid_in_kernel=True, backend=self.backend,
        )  # fmt: skip
        return x + self.out(o.flatten(-2))


class Recall(nn.Module):
    """Pairs of a key and a value, then the keys again: which value was it?"""

    def __init__(self, backend: str, width: int = 128, heads: int = 2, dim: int = 64):
        super().__init__()
        self.keys, self.values = nn.Embedding(NUM_KEYS, width), nn.Embedding(NUM_VALUES + 1, width)
        self.layers = nn.ModuleList(Layer(width, heads, dim, backend) for _ in range(2))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, NUM_VALUES))

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        x = self.keys(keys) + self.values(values)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batches(steps: int, seed: int, device):
    """keys and values [BATCH, 2 * NUM_PAIRS], targets of the second half; a query has value NUM_VALUES."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        keys = torch.rand(BATCH, NUM_KEYS, generator=generator).argsort(1)[:, :NUM_PAIRS]
        values = torch.randint(NUM_VALUES, keys.shape, generator=generator)
        order = torch.rand(keys.shape, generator=generator).argsort(1)
        asked = torch.full_like(values, NUM_VALUES)
        yield (
            torch.cat([keys, keys.gather(1, order)], 1).to(device),
            torch.cat([values, asked], 1).to(device),
            values.gather(1, order).to(device),
        )


def loss_of(model: nn.Module, batch, dtype: torch.dtype) -> torch.Tensor:
    """Nats a question."""
    keys, values, targets = batch
    with torch.autocast(keys.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(keys, values)[:, NUM_PAIRS:]
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(backend: str, device, dtype: torch.dtype, seed: int, steps: int = STEPS) -> list[float]:
    """The loss of every step, in nats a question."""
    torch.manual_seed(seed)
    model = Recall(backend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step, batch in enumerate(batches(steps, seed, device)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        loss = loss_of(model, batch, dtype)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def assert_learned(losses: list[float]) -> None:
    chance, final = math.log(NUM_VALUES), sum(losses[-20:]) / 20
    assert abs(losses[0] - chance) < 0.5, f"starts at {losses[0]:.2f}, chance is {chance:.2f}"
    assert final < chance / 4, f"ends at {final:.2f}, chance is {chance:.2f}"


@pytest.mark.slow
def test_the_task_is_learned_by_the_torch_backend(seed):
    """So that the test below can fail for the kernels' sake alone."""
    assert_learned(train("torch", torch.device("cpu"), torch.float32, seed))


@pytest.mark.gpu
def test_both_backends_learn_alike(hopper, seed):
    """The first steps agree within 1%, before rounding has had time to grow; both learn the task."""
    ours = train("cuda", hopper.device, torch.bfloat16, seed)
    theirs = train("torch", hopper.device, torch.bfloat16, seed)
    for step, (x, y) in enumerate(zip(ours[:20], theirs[:20])):
        assert abs(x - y) < 0.01 * y, f"step {step}: {x:.4f} against {y:.4f}"
    assert_learned(ours)
    assert_learned(theirs)


# -- several processes ---------------------------------------------------------------------------------------

WORLD_SIZE = 2


def gradients_of_part(rank: int, backend: str, device: str, dtype: torch.dtype, seed: int) -> dict:
    """By DistributedDataParallel, of a process with its part of the batch."""
    torch.manual_seed(seed)
    model = DistributedDataParallel(Recall(backend).to(device))
    (batch,) = batches(1, seed, torch.device(device))
    loss_of(model, [x.chunk(WORLD_SIZE)[rank] for x in batch], dtype).backward()
    return {name: x.grad.cpu() for name, x in model.module.named_parameters()}


def run_process(rank: int, folder: str, *arguments) -> None:
    """One of a group of WORLD_SIZE; the first keeps the gradients."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD_SIZE)
    gradients = gradients_of_part(rank, *arguments)  # and its model is gone before the group is
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_processes_that_share_a_batch_get_its_gradients(backend, tmp_path, seed):
    """DistributedDataParallel: the mean of the parts' gradients is that of the whole."""
    arguments = (str(tmp_path), backend.name, str(backend.device), backend.dtype, seed)
    torch.multiprocessing.spawn(run_process, arguments, nprocs=WORLD_SIZE)
    torch.manual_seed(seed)
    model = Recall(backend.name).to(backend.device)
    (batch,) = batches(1, seed, backend.device)
    loss_of(model, batch, backend.dtype).backward()
    bar = {torch.float32: 1e-5, torch.float64: 1e-10}.get(backend.dtype, 1e-2)
    for name, expected in torch.load(tmp_path / "gradients").items():
        compare.assert_close(model.get_parameter(name).grad, expected, bar, name)
