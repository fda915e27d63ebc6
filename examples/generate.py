"""Generation as an inference engine does it, with a small random model: `python examples/generate.py`.

Every request's prompt is read with chunk_gdn2, whose final states go to a slot of the cache. Then all running
requests decode together, one token a step, with fused_recurrent_gdn2: it finds each one's state by the index
of its slot and updates it in place. Requests join when a row of the batch is free and leave when they are
done; a free row has the index -1, which costs nothing and touches nothing. On a GPU the step is one CUDA
graph, replayed with other tokens and other indices.

At the end every request is run again alone; its tokens have to be the same. The exit status is 1 if not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gdn2_ext import chunk_gdn2, fused_recurrent_gdn2

GATES = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_gate_sigmoid_in_kernel": True}


# ------------------------------------------------------------------------------------------------------------
# The model
# ------------------------------------------------------------------------------------------------------------


class TokenMixer(nn.Module):
    """Gated DeltaNet-2 between two projections: what else an attention layer would do."""

    def __init__(self, width: int, heads: int, value_heads: int, dim: int):
        super().__init__()
        self.heads, self.value_heads, self.dim = heads, value_heads, dim
        self.sizes = [heads * dim] * 4 + [value_heads * dim] * 2  # q, k, g, b; v, w
        self.projection = nn.Linear(width, sum(self.sizes), bias=False)
        self.output = nn.Linear(value_heads * dim, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.empty(heads * dim).uniform_(-6.9, -2.3).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())

    def _project(self, x: Tensor) -> dict[str, Tensor]:
        """The op's inputs as views of one projection [B, T, all heads]."""
        parts = self.projection(x).split(self.sizes, dim=-1)
        q, k, g, b = (part.unflatten(-1, (self.heads, self.dim)) for part in parts[:4])
        v, w = (part.unflatten(-1, (self.value_heads, self.dim)) for part in parts[4:])
        tensors = {"q": q, "k": k, "v": v, "g": g.float(), "b": b, "w": w}
        return tensors | {"A_log": self.A_log.float(), "dt_bias": self.dt_bias.float()} | GATES

    def prefill(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [1, T, width] -> the same, and the final state [1, HV, K, V]."""
        o, state = chunk_gdn2(**self._project(x), output_final_state=True)
        return self.output(o.flatten(2)), state

    def decode(self, x: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
        """x [batch, 1, width] -> the same; states pool[slots] are updated in place."""
        o, _ = fused_recurrent_gdn2(
            **self._project(x), initial_state=pool, state_indices=slots, inplace_final_state=True
        )
        return self.output(o.flatten(2))


class Model(nn.Module):
    def __init__(self, vocabulary: int, layers: int, width: int, heads: int, value_heads: int, dim: int):
        super().__init__()
        self.state_shape = (layers, value_heads, dim, dim)
        self.embedding = nn.Embedding(vocabulary, width)
        self.mixers = nn.ModuleList(TokenMixer(width, heads, value_heads, dim) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.vocabulary = nn.Linear(width, vocabulary, bias=False)

    @staticmethod
    def _normalise(x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:])

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [1, T] -> logits of the next token [1, vocabulary], and states [layers, HV, K, V]."""
        x, states = self.embedding(tokens), []
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            mixed, state = mixer.prefill(self._normalise(x))
            x = x + mixed
            x = x + mlp(self._normalise(x))
            states.append(state[0])
        return self.vocabulary(self._normalise(x[:, -1])), torch.stack(states)

    def decode(self, tokens: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        """tokens [batch], cache [slots, layers, HV, K, V] -> logits [batch, vocabulary]."""
        x = self.embedding(tokens).unsqueeze(1)
        for layer, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer.decode(self._normalise(x), cache[:, layer], slots)
            x = x + mlp(self._normalise(x))
        return self.vocabulary(self._normalise(x[:, 0]))


# ------------------------------------------------------------------------------------------------------------
# The engine
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    name: str
    prompt: list[int]
    new_tokens: int
    arrives: int = 0  # before which step
    generated: list[int] = field(default_factory=list)
    joined: int = -1  # at which step
    left: int = -1


class Engine:
    """A batch of fixed size, a cache with a slot for every request that runs, and the step over both."""

    def __init__(self, model: Model, batch: int, slots: int, device: torch.device):
        self.model, self.device = model, device
        self.cache = torch.zeros(slots, *model.state_shape, device=device)
        self.rows: list[Request | None] = [None] * batch
        self.free_slots = list(range(slots))
        self.slot_of_row = [-1] * batch
        # What a step reads and writes: these stay where they are.
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        self.slots = torch.full((batch,), -1, dtype=torch.int32, device=device)
        self.next_tokens = torch.zeros_like(self.tokens)
        self.replay = self._capture() if device.type == "cuda" else self._step

    def _step(self) -> None:
        logits = self.model.decode(self.tokens, self.cache, self.slots)
        self.next_tokens.copy_(logits.argmax(-1))

    def _capture(self):
        """The step as a CUDA graph; all rows are free meanwhile, so that no state changes."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def join(self, request: Request, step: int) -> bool:
        """Reads the prompt, which gives the first token, and takes a row and a slot, if any is free."""
        if None not in self.rows:
            return False
        row, slot = self.rows.index(None), self.free_slots.pop()
        logits, states = self.model.prefill(torch.tensor([request.prompt], device=self.device))
        self.cache[slot] = states
        request.generated, request.joined = [int(logits.argmax())], step
        self.rows[row], self.slot_of_row[row] = request, slot
        self.tokens[row], self.slots[row] = request.generated[0], slot
        return True

    def step(self, step: int) -> None:
        """One token for every request in the batch; those that are done leave."""
        self.replay()
        self.tokens.copy_(self.next_tokens)
        for row, (request, token) in enumerate(zip(self.rows, self.next_tokens.tolist(), strict=True)):
            if request is None:
                continue
            request.generated.append(token)
            if len(request.generated) == request.new_tokens:
                request.left = step
                self.free_slots.insert(0, self.slot_of_row[row])
                self.rows[row], self.slot_of_row[row] = None, -1
                self.slots[row] = -1

    def run(self, requests: list[Request]) -> int:
        """All requests to their end; how many steps that took."""
        waiting, step = deque(sorted(requests, key=lambda request: request.arrives)), 0
        while waiting or any(self.rows):
            while waiting and waiting[0].arrives <= step and self.join(waiting[0], step):
                waiting.popleft()
            if any(self.rows):
                self.step(step)
            step += 1
        return step


# ------------------------------------------------------------------------------------------------------------
# The example
# ------------------------------------------------------------------------------------------------------------


def make_requests(number: int, prompt: int, new_tokens: int, vocabulary: int, seed: int) -> list[Request]:
    """Prompts of equal length, answers of different ones, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Request(
            name=f"request {n}",
            prompt=torch.randint(vocabulary, (prompt,), generator=generator).tolist(),
            new_tokens=max(2, new_tokens - n % 3 * (new_tokens // 4)),
            arrives=n * new_tokens // 5,
        )
        for n in range(number)
    ]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="rows of the batch")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=None, help="K and V; default: 128 on a GPU, 32 on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, least in (("requests", 1), ("batch", 1), ("prompt", 1), ("new_tokens", 2), ("layers", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """0 if every request gets the tokens that it gets alone."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    dim = options.dim or (128 if device.type == "cuda" else 32)
    torch.manual_seed(options.seed)
    model = Model(vocabulary=512, layers=options.layers, width=4 * dim, heads=2, value_heads=4, dim=dim)
    model = model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    requests = make_requests(options.requests, options.prompt, options.new_tokens, 512, options.seed)

    engine = Engine(model, options.batch, slots=2 * options.batch, device=device)
    begin = time.perf_counter()
    steps = engine.run(requests)
    seconds = time.perf_counter() - begin
    tokens = sum(len(request.generated) for request in requests)
    print(f"{len(requests)} requests, {tokens} tokens, {steps} steps on {device} in {seconds:.2f} s")

    alone = Engine(model, options.batch, slots=2 * options.batch, device=device)
    equal = True
    for request in requests:
        again = Request(request.name, request.prompt, request.new_tokens)
        alone.run([again])
        same = again.generated == request.generated
        equal = equal and same
        print(
            f"{request.name}: steps {request.joined} to {request.left}, {len(request.generated)} tokens, "
            f"{'the same' if same else 'NOT THE SAME'} alone"
        )
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
