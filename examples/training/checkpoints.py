"""Checkpoints: all that a run needs to go on as if it had never stopped.

    OUTPUT/checkpoints/step-00000500/
        config.json, model.safetensors, ...   the model, for from_pretrained; and the tokenizer
        optimizer/                            moments, sharded as they are (torch.distributed.checkpoint)
        random-0.pt, ...                      generators of every process
        training.json                         counters, and the settings that a resumed run has to share

A checkpoint is written under another name and then renamed: what has its name is complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers.utils import logging

from .processes import Processes

logging.disable_progress_bar()  # of the one file of weights
NAME = re.compile(r"step-(\d+)")


def complete(folder: Path) -> list[Path]:
    """Those in `folder`, the oldest first."""
    found = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(NAME.fullmatch(path.name)[1]))


def read_training(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "training.json").read_text())


# ---- random numbers ----------------------------------------------------------------------------------------


def random_state(device: torch.device) -> dict:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict, device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


# ---- writing -----------------------------------------------------------------------------------------------


class Checkpoints:
    """Those of one run."""

    def __init__(self, folder: Path, keep: int, tokenizer, processes: Processes):
        self.folder, self.keep, self.tokenizer, self.processes = folder, keep, tokenizer, processes

    def newest(self) -> Path | None:
        return (complete(self.folder) or [None])[-1]

    def remove_unfinished(self) -> None:
        """What a killed run was writing or removing."""
        for path in [*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")]:
            shutil.rmtree(path)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, training: dict) -> Path:
        """Of all processes together."""
        path = self.folder / f"step-{training['step']:08d}"
        unfinished = self.folder / f".writing-{path.name}"
        if self.processes.first:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.processes.wait()

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(model, options=whole)  # on the first process only, if sharded
        if self.processes.first:
            for name in _second_names(model):
                weights.pop(name, None)  # whole tensors of tied weights are copies of each other
            model.save_pretrained(unfinished, state_dict=weights, max_shard_size="1000GB")
            self.tokenizer.save(unfinished)
        del weights
        moments = get_optimizer_state_dict(model, optimizer)
        with _quiet():
            dcp.save(moments, checkpoint_id=unfinished / "optimizer", no_dist=not self.processes.distributed)
        state = random_state(self.processes.device)
        torch.save(state, unfinished / f"random-{self.processes.rank}.pt")
        self.processes.wait()

        if self.processes.first:
            (unfinished / "training.json").write_text(json.dumps(training, indent=2) + "\n")
            _flush_to_disk(unfinished)
            unfinished.rename(path)
            _flush(self.folder)
            self._remove_old()
        self.processes.wait()
        return path

    def _remove_old(self) -> None:
        for path in complete(self.folder)[: -self.keep] if self.keep else []:
            leaving = path.with_name(f".removing-{path.name}")
            path.rename(leaving)  # first, so that what has the name of a checkpoint is never half of one
            shutil.rmtree(leaving)


def _second_names(model: nn.Module) -> set[str]:
    """Of parameters that have more than one."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names - {name for name, _ in model.named_parameters()}


def _flush_to_disk(folder: Path) -> None:
    """The files before the name: it must not outlive a power cut that they do not."""
    for path in [*folder.rglob("*"), folder]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading -----------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Into the bare model, before it is spread over processes."""
    safetensors.torch.load_model(model, checkpoint / "model.safetensors")


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    moments = get_optimizer_state_dict(model, optimizer)
    with _quiet():
        dcp.load(moments, checkpoint_id=checkpoint / "optimizer")
    set_optimizer_state_dict(model, optimizer, moments)


def load_random_state(checkpoint: Path, processes: Processes) -> None:
    """Of this process; one that was not there keeps what its seed gave it."""
    path = checkpoint / f"random-{processes.rank}.pt"
    if path.exists():
        set_random_state(torch.load(path, weights_only=False), processes.device)


class _quiet(warnings.catch_warnings):
    """DCP warns of internals, and that one process is alone."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
