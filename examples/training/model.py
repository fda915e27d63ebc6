"""The model: its configuration, its weights, and its spread over processes."""

from __future__ import annotations

import contextlib
import inspect
import json
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from .data import Sequences
from .processes import Processes
from .settings import Refusal, Settings

try:
    from gdn2_ext import models as gdn2_models  # registers model type "gated_deltanet2"
except ImportError:
    gdn2_models = None

# What says nothing of the model's arithmetic.
NOT_COMPARED = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype"}


# ---- configuration -----------------------------------------------------------------------------------------


def make_config(settings: Settings, vocabulary: int, eos: int) -> PretrainedConfig:
    """That of --config with the changes asked for, and with the tokenizer's vocabulary."""
    changes = {"vocab_size": -(-vocabulary // 64) * 64, "bos_token_id": None, "eos_token_id": eos}
    changes |= {"pad_token_id": None, **settings.overrides}
    if settings.layers:
        changes["num_hidden_layers"] = settings.layers
    path = Path(settings.config)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = _read_config(path, changes) if path.is_file() else _named_config(settings.config, changes)
    except Refusal:
        raise
    except Exception as error:  # a config class checks its fields as it likes
        raise Refusal(f"--config {settings.config}: {' '.join(str(error).split())}") from error
    known = type(config)().to_dict().keys() | inspect.signature(type(config)).parameters.keys()
    for key in settings.overrides:
        if key not in known:
            raise Refusal(f"--set {key}: {type(config).__name__} has no such field")
    if config.vocab_size < vocabulary:
        raise Refusal(f"--set vocab_size={config.vocab_size}: the tokenizer has {vocabulary} tokens")
    return config


def _read_config(path: Path, changes: dict) -> PretrainedConfig:
    fields = json.loads(path.read_text())
    layers = changes.get("num_hidden_layers")
    if layers and "layer_types" not in changes and fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:layers]
    fields = {key: value for key, value in (fields | changes).items() if key not in NOT_COMPARED}
    return AutoConfig.for_model(fields.pop("model_type", "gated_deltanet2"), **fields)


def _named_config(name: str, changes: dict) -> PretrainedConfig:
    if gdn2_models is None:
        raise Refusal(f"--config {name}: no such file or folder, and this gdn2_ext has no models by name")
    return gdn2_models.GatedDeltaNet2Config.named(name, **changes)


def comparable(config: PretrainedConfig) -> dict:
    """The configuration as JSON gives it back, to compare with that of a checkpoint."""
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_COMPARED}
    return json.loads(json.dumps(fields, default=str))


# ---- weights -----------------------------------------------------------------------------------------------


def make_model(config: PretrainedConfig, settings: Settings) -> nn.Module:
    """The bare model on the CPU in float32, with the same weights in every process."""
    torch.manual_seed(settings.seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # a model class checks its config as it likes
        raise Refusal(f"--config {settings.config}: {' '.join(str(error).split())}") from error
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise Refusal(f"--gradient-checkpointing: {type(model).__name__} does not support it")
        # transformers 5.23 has another name for it.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return model.train()


def layers_of(model: nn.Module) -> nn.ModuleList:
    number = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise Refusal(f"{type(model).__name__}: there is no list of its {number} layers")


# ---- the model of all processes ----------------------------------------------------------------------------


class ParallelModel:
    """A model on its device, alone or beside those of other processes that see other sequences.

    Parameters are float32 in either way, and autocast rounds them where it multiplies: FSDP's own mixed
    precision would round what has to stay exact, such as a decay's logarithm.
    """

    def __init__(self, model: nn.Module, settings: Settings, processes: Processes):
        self.bare = model
        self.device, self.autocast = processes.device, settings.autocast
        if settings.compile:
            for layer in layers_of(model):
                layer.compile()
        self.sharded = processes.distributed and settings.parallel == "fsdp"
        if self.sharded:
            mesh = torch.distributed.init_device_mesh(self.device.type, (processes.size,))
            for layer in layers_of(model):
                fully_shard(layer, mesh=mesh)
            self.bare = self.module = fully_shard(model, mesh=mesh)
        elif processes.distributed:
            self.module = DistributedDataParallel(model.to(self.device), gradient_as_bucket_view=True)
        else:
            self.module = model.to(self.device)

    def loss(self, tokens: Tensor, module: nn.Module | None = None) -> Tensor:
        """The mean cross entropy of each token [B, T] given those before it, T - 1 in every row."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return (module or self.module)(input_ids=tokens, labels=tokens, use_cache=False).loss

    def synchronised(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch: gradients are averaged after the last one only."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
            self.module.set_is_last_backward(last)
        elif isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def warm_up(self, tokens: Tensor) -> None:
        """One forward and backward without effect, where DDP needs it for the same bits in a resumed run.

        After its first backward DDP groups the gradients into other buckets, and with that sums them in
        another order. A run that goes on with update 100 and one that comes from update 99 are to do the
        same there.
        """
        if isinstance(self.module, DistributedDataParallel):
            for _ in range(2):  # the new buckets are made at the second
                self.loss(tokens).backward()
                self.module.zero_grad(set_to_none=True)

    def clip(self, largest: float) -> float:
        """Scales the gradients to a norm of at most `largest`; what it was before."""
        norm = nn.utils.clip_grad_norm_(self.bare.parameters(), largest)
        return float(norm.full_tensor() if self.sharded else norm)

    @torch.no_grad()
    def is_finite(self, processes: Processes) -> bool:
        """All parameters of all processes."""
        own = [parameter.to_local() if self.sharded else parameter for parameter in self.bare.parameters()]
        finite = torch.stack([x.isfinite().all() for x in own]).all().float()
        return bool(processes.mean(finite) == 1)

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, micro_batch: int, processes: Processes) -> float:
        """The mean loss of all `sequences`, which the processes share out."""
        self.bare.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        together = micro_batch * processes.size
        for begin in range(0, len(sequences), together):
            numbers = np.arange(begin, min(begin + together, len(sequences)))
            mine = numbers[processes.rank * micro_batch :][:micro_batch]
            # FSDP wants every process there; one without a sequence of its own takes another's, for nothing.
            tokens = sequences.read(mine if len(mine) else numbers[:1], self.device)
            total += self.loss(tokens, self.bare).double() * len(mine)
        self.bare.train()
        if self.sharded:
            self.bare.reshard()  # the root keeps its parameters whole for a backward, which does not come
        return float(processes.mean(total)) * processes.size / len(sequences)
