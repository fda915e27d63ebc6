"""Text to tokens, once, and tokens to batches.

Documents, each followed by EOS, stand one after the other in one memory-mapped file; sequences are its
pieces of equal length. Which sequences make up an update follows from the seed and the number of the update
alone, so that a resumed run needs no state of a loader.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .settings import Refusal, Settings, matching_files

PIECE = 1 << 16  # characters of a text file that are tokenised as one
TOGETHER = 1 << 20  # characters tokenised in one call: a fast tokenizer spreads them over the cores
FORMAT = 1  # of the files written here


# ---- tokenizers --------------------------------------------------------------------------------------------


class Bytes:
    """The bytes of UTF-8, and 256 for the end of a document."""

    size, eos, identity = 257, 256, "bytes"

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def save(self, folder: Path) -> None:
        """Nothing to save: training.json names it."""


class Pretrained:
    """A tokenizer of `transformers`, without the special tokens that it would add."""

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # whatever the formats, the network and the files can give
            raise Refusal(f"--tokenizer {name}: {_one_line(error)}") from error
        if self.tokenizer.eos_token_id is None:
            raise Refusal(f"--tokenizer {name}: it has no EOS token")
        self.size, self.eos = len(self.tokenizer), self.tokenizer.eos_token_id
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        self.identity = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).input_ids

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def make_tokenizer(name: str) -> Bytes | Pretrained:
    return Bytes() if name == "bytes" else Pretrained(name)


# ---- documents ---------------------------------------------------------------------------------------------

# Pieces of documents in order, and whether a piece is the end of one.
Pieces = Iterable[tuple[str, bool]]


@dataclass(frozen=True)
class Files:
    """Local files, in the order of the patterns and of their names."""

    patterns: tuple[str, ...]
    text_field: str

    @property
    def paths(self) -> list[Path]:
        return [path for pattern in self.patterns for path in matching_files(pattern)]

    def identity(self) -> list:
        return ["files", self.text_field, *map(_file_identity, self.paths)]

    def pieces(self) -> Pieces:
        for path in self.paths:
            try:
                with path.open(encoding="utf-8") as file:
                    yield from self._lines(path, file) if path.suffix == ".jsonl" else self._text(file)
            except UnicodeDecodeError as error:
                raise Refusal(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from error
            except OSError as error:
                raise Refusal(f"{path}: {error.strerror}") from error

    def _lines(self, path: Path, file: Iterable[str]) -> Pieces:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[self.text_field]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise Refusal(
                    f"{path}, line {number}: expected a JSON object with {self.text_field!r}"
                ) from error
            yield _text(text, f"{path}, line {number}", self.text_field), True

    def _text(self, file) -> Pieces:
        """Whole lines, up to about PIECE characters, so that a large file is never in memory."""
        empty = True
        while lines := file.readlines(PIECE):
            empty = False
            yield "".join(lines), False
        if not empty:
            yield "", True


@dataclass(frozen=True)
class Dataset:
    """A split of a Hugging Face dataset, streamed: the copy that is kept is that of the tokens."""

    name: str
    config: str | None
    split: str
    text_field: str

    def identity(self) -> list:
        folder = Path(self.name)
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
        return ["dataset", self.name, self.config, self.split, self.text_field, *map(_file_identity, files)]

    def pieces(self) -> Pieces:
        for number, row in enumerate(self._open()):
            if self.text_field not in row:
                raise Refusal(
                    f"--text-field: {self.name} has no {self.text_field!r} but {', '.join(map(repr, row))}"
                )
            yield _text(row[self.text_field], f"{self.name}, row {number}", self.text_field), True

    def _open(self):
        import datasets

        saved = Path(self.name)
        try:
            if (saved / "dataset_dict.json").exists():
                return datasets.load_from_disk(str(saved))[self.split]
            if (saved / "state.json").exists():
                return datasets.load_from_disk(str(saved))
            return datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
        except Exception as error:  # whatever the formats, the network and the files can give
            raise Refusal(f"--dataset {self.name}: {_one_line(error)}") from error


def sources(settings: Settings) -> tuple[Files | Dataset, Files | Dataset | None]:
    """Of the training data, and of the held-out data where that is not the end of the former."""
    if settings.dataset is None:
        training = Files(tuple(settings.files), settings.text_field)
    else:
        training = Dataset(
            settings.dataset, settings.dataset_config, settings.dataset_split, settings.text_field
        )
    if settings.eval_files:
        return training, Files(tuple(settings.eval_files), settings.text_field)
    if settings.eval_split:
        return training, Dataset(
            settings.dataset, settings.dataset_config, settings.eval_split, settings.text_field
        )
    return training, None


def _text(text: object, where: str, field: str) -> str:
    if not isinstance(text, str):
        raise Refusal(f"{where}: expected a string in {field!r}, got {type(text).__name__}")
    return text


def _file_identity(path: Path) -> list:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- the file of tokens ------------------------------------------------------------------------------------


def corpus_key(source: Files | Dataset, tokenizer: Bytes | Pretrained, limit: int | None) -> str:
    """Names what `tokenised` gives, without reading the text."""
    content = json.dumps([FORMAT, source.identity(), tokenizer.identity, tokenizer.eos, limit])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


def tokenised(
    source: Files | Dataset, tokenizer: Bytes | Pretrained, limit: int | None, cache: Path, label: str
) -> Path:
    """The folder of the tokens of `source`, at most `limit`; they are made if they are not in the cache."""
    key = corpus_key(source, tokenizer, limit)
    folder = cache / key
    if (folder / "corpus.json").exists():
        return folder
    unfinished = cache / f".{key}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        dtype = np.dtype(np.uint16 if tokenizer.size <= 1 << 16 else np.uint32)
        with (unfinished / "tokens.bin").open("wb") as file:
            tokens = _write(file, source.pieces(), tokenizer, dtype, limit, label)
        content = {"tokens": tokens, "dtype": dtype.name, "tokenizer": tokenizer.identity}
        (unfinished / "corpus.json").write_text(json.dumps(content))
        try:
            unfinished.rename(folder)
        except OSError:
            if not (folder / "corpus.json").exists():  # else another run was quicker with the same
                raise
    except OSError as error:
        raise Refusal(f"--cache {cache}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _write(file, pieces: Pieces, tokenizer, dtype: np.dtype, limit: int | None, label: str) -> int:
    """How many tokens were written."""
    from tqdm import tqdm

    end, written = np.array([tokenizer.eos], dtype), 0
    with tqdm(desc=f"tokenising {label}", unit=" tokens", unit_scale=True, leave=False) as progress:
        for together in _batched(pieces):
            encoded = tokenizer.encode([text for text, _ in together])
            parts = []
            for ids, (_, ends) in zip(encoded, together, strict=True):
                parts.append(np.asarray(ids, dtype))
                if ends:
                    parts.append(end)
            tokens = np.concatenate(parts)
            if limit is not None:
                tokens = tokens[: limit - written]
            tokens.tofile(file)
            written += len(tokens)
            progress.update(len(tokens))
            if written == limit:
                break
    return written


def _batched(pieces: Pieces) -> Iterator[list[tuple[str, bool]]]:
    together, size = [], 0
    for piece in pieces:
        together.append(piece)
        size += len(piece[0]) + 1
        if size >= TOGETHER:
            yield together
            together, size = [], 0
    if together:
        yield together


# ---- sequences and their order -----------------------------------------------------------------------------


class Sequences:
    """Some of the sequences of a corpus: `seq_len` tokens each, what is left over at the end is not used.

    A sequence goes on where the one before it ends, documents run from one to the next.
    """

    def __init__(self, folder: Path, seq_len: int, begin: int = 0, end: int | None = None):
        corpus = json.loads((folder / "corpus.json").read_text())
        number = corpus["tokens"] // seq_len
        self.rows = np.empty((0, seq_len), np.uint16)
        if number:
            tokens = np.memmap(folder / "tokens.bin", corpus["dtype"], "r", shape=(number, seq_len))
            self.rows = tokens[begin:end]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, numbers: np.ndarray, device: torch.device) -> Tensor:
        """[len(numbers), seq_len], int64."""
        tokens = torch.from_numpy(self.rows[numbers].astype(np.int64))
        if device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(device, non_blocking=True)


class ShuffledOrder:
    """Numbers below `number`, all of them in another order in every epoch."""

    def __init__(self, number: int, seed: int):
        self.number, self.seed = number, seed
        self._epoch, self._order = -1, None

    def __call__(self, begin: int, end: int) -> np.ndarray:
        """Those at places begin to end of the endless sequence of epochs."""
        parts = []
        while begin < end:
            epoch, place = divmod(begin, self.number)
            part = self._permutation(epoch)[place : place + end - begin]
            parts.append(part)
            begin += len(part)
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self.number)
        return self._order
