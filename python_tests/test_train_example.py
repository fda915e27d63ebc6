"""examples/train.py: it learns, goes on after a kill with the same bits, and refuses what cannot work."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs the extra train")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WORDS = "the quick brown fox jumps over a lazy dog while seven small birds sing in an old tree".split()


# ---- what the tests share ----------------------------------------------------------------------------------


def write_config(path: Path, dropout: float = 0.0) -> Path:
    """A model of a few thousand parameters. With dropout, random numbers count too."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    fields |= {"model_type": "llama", "num_key_value_heads": 2, "attention_dropout": dropout}
    path.write_text(json.dumps(fields))
    return path


def write_text(path: Path, seed: int, words: int = 3000) -> Path:
    generator = np.random.default_rng(seed)
    lines = [" ".join(generator.choice(WORDS, 10)) for _ in range(words // 10)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def train():
    """The example as a module, in one thread, so that its bits are those of a process of its own."""
    sys.path.insert(0, str(EXAMPLES))
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_num_threads(1)
    import train

    yield train
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    sys.path.remove(str(EXAMPLES))
    for name in [name for name in sys.modules if name == "train" or name.split(".")[0] == "training"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with two files of text and two configurations."""
    folder = tmp_path_factory.mktemp("inputs")
    write_text(folder / "one.txt", seed=1)
    write_text(folder / "two.txt", seed=2)
    write_config(folder / "plain.json")
    write_config(folder / "dropout.json", dropout=0.1)
    return folder


def options(inputs: Path, output: Path, config: str = "plain.json", **changes: object) -> list[str]:
    """A command line of 40 updates of 4 sequences, in parts of 2."""
    values = {
        "files": inputs / "*.txt", "output": output, "device": "cpu",
        "config": inputs / config if (inputs / config).exists() else config,
        "seq-len": 32, "batch": 4, "micro-batch": 2, "tokens": 40 * 4 * 32, "warmup-tokens": 4 * 4 * 32,
        "lr": 1e-2, "eval-sequences": 6, "eval-every": 20, "save-every": 10, "seed": 3,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }  # fmt: skip
    values = {name: value for name, value in values.items() if value is not None}
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in values.items()]
    return [word for pair in words for word in pair]


def in_own_process(arguments: list[str], processes: int = 0) -> list[str]:
    """The command that trains with `arguments`, under torchrun if `processes` are given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes else []), str(EXAMPLES / "train.py"), *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(arguments: list[str], processes: int = 0) -> str:
    done = subprocess.run(
        in_own_process(arguments, processes), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def log_of(output: Path) -> list[dict]:
    """Without the times."""
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: x for key, x in entry.items() if key != "tokens_per_second"} for entry in entries]


def losses_of(output: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in log_of(output) if name in entry]


def checkpoints_of(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def finished(train, inputs, tmp_path_factory) -> Path:
    """The output of a run from beginning to end, with dropout."""
    output = tmp_path_factory.mktemp("finished")
    assert train.main(options(inputs, output, "dropout.json", tensorboard=True)) == 0
    return output


# ---- training ----------------------------------------------------------------------------------------------


def test_the_loss_falls_and_everything_is_left_behind(finished):
    entries = [entry for entry in log_of(finished) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 41))
    assert entries[-1]["tokens"] == 40 * 4 * 32 and all(entry["grad_norm"] > 0 for entry in entries)
    losses = [entry["loss"] for entry in entries]
    assert losses[0] == pytest.approx(math.log(320), abs=0.3), "320 logits, nothing learnt"
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    evaluations = [entry for entry in log_of(finished) if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [20, 40]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"] < losses[0]
    assert evaluations[1]["perplexity"] == pytest.approx(math.exp(evaluations[1]["eval_loss"]))
    assert checkpoints_of(finished) == ["step-00000020", "step-00000030", "step-00000040"], "--keep is 3"
    assert list((finished / "tensorboard").glob("events.*"))


def test_a_checkpoint_is_a_pretrained_model(finished):
    checkpoint = finished / "checkpoints" / "step-00000040"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokens = torch.from_numpy(np.frombuffer(b"the quick brown fox jumps over a", np.uint8).astype(np.int64))[
        None
    ]
    with torch.no_grad():
        loss = model(input_ids=tokens, labels=tokens).loss
    assert loss < losses_of(finished)[0] - 1
    assert model.config.architectures == ["LlamaForCausalLM"] and model.config.eos_token_id == 256


def test_a_killed_run_goes_on_with_the_same_bits(train, inputs, finished, tmp_path, capfd):
    arguments = options(inputs, tmp_path, "dropout.json")
    process = subprocess.Popen(
        in_own_process(arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log, deadline = tmp_path / "log.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "checkpoints" / "step-00000010").exists() and log.read_text().count('"loss"') > 12:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL

    # What a kill at other times leaves: half a checkpoint, half of a removal, half a line.
    (tmp_path / "checkpoints" / ".writing-step-00000050").mkdir()
    (tmp_path / "checkpoints" / ".removing-step-00000005").mkdir()
    with log.open("a") as file:
        file.write('{"step": 14, "lo')
    assert train.main([*arguments, "--resume"]) == 0
    assert "resumed from" in capfd.readouterr().out
    assert log_of(tmp_path) == log_of(finished)
    assert checkpoints_of(tmp_path) == checkpoints_of(finished)
    weights = [
        folder / "checkpoints" / "step-00000040" / "model.safetensors" for folder in (tmp_path, finished)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_finished_run_resumed_has_nothing_left_to_do(train, inputs, finished, capsys):
    before = log_of(finished)
    assert train.main(options(inputs, finished, "dropout.json", resume=True)) == 0
    assert log_of(finished) == before and "step-00000040" in capsys.readouterr().out


def test_resume_without_a_checkpoint_starts_from_the_beginning(train, inputs, tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.0}\n')
    assert train.main(options(inputs, tmp_path, resume=True, tokens=2 * 4 * 32, warmup_tokens=0)) == 0
    assert len(losses_of(tmp_path)) == 2 and "nothing to resume from" in capsys.readouterr().out


def test_accumulated_parts_give_what_the_batch_gives(train, inputs, tmp_path):
    """To rounding: the first losses are sums in another order, later ones of weights that differ by it."""
    for micro_batch in (1, 2, 4):
        arguments = options(inputs, tmp_path / str(micro_batch), micro_batch=micro_batch, tokens=10 * 4 * 32)
        assert train.main(arguments) == 0
    whole = tmp_path / "4"
    for parts in (tmp_path / "1", tmp_path / "2"):
        assert losses_of(parts)[0] == pytest.approx(losses_of(whole)[0], rel=1e-6)
        assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-4)
        assert losses_of(parts, "eval_loss") == pytest.approx(losses_of(whole, "eval_loss"), rel=1e-4)


@pytest.mark.parametrize("option", ["gradient-checkpointing", "autocast"])
def test_options_that_change_rounding_only(train, inputs, tmp_path, option):
    short = {"tokens": 5 * 4 * 32, "save_every": 5}
    assert train.main(options(inputs, tmp_path / "plain", **short)) == 0
    assert train.main(options(inputs, tmp_path / "other", **short, **{option: True})) == 0
    close = pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6 if option != "autocast" else 2e-2)
    assert losses_of(tmp_path / "other") == close


def test_a_gated_deltanet_2_learns(train, inputs, tmp_path):
    pytest.importorskip("gdn2_ext.models", reason="this gdn2_ext has no models")
    arguments = options(inputs, tmp_path, config="tiny", tokens=20 * 4 * 32)
    assert train.main(arguments) == 0
    whole = log_of(tmp_path)
    assert whole[-2]["loss"] < 0.8 * whole[0]["loss"]
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000020")
    assert train.main([*arguments, "--resume"]) == 0
    assert log_of(tmp_path) == whole


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "processes"), [("ddp", 3), ("fsdp", 2)])
def test_processes_train_as_one_and_resume_with_the_same_bits(train, inputs, tmp_path, parallel, processes):
    """Three for DDP: the sum of two gradients has the same bits in any order."""
    short = {"batch": 6, "micro_batch": 1, "tokens": 12 * 6 * 32, "warmup_tokens": 0, "save_every": 8}
    assert train.main(options(inputs, tmp_path / "one", **short)) == 0
    arguments = options(inputs, tmp_path / "all", **short, parallel=parallel)
    run(arguments, processes)
    one, together = losses_of(tmp_path / "one"), losses_of(tmp_path / "all")
    assert together[0] == pytest.approx(one[0], rel=1e-6) and together == pytest.approx(one, rel=1e-4)
    evaluations = [losses_of(tmp_path / name, "eval_loss") for name in ("one", "all")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)

    whole = log_of(tmp_path / "all")
    shutil.rmtree(tmp_path / "all" / "checkpoints" / "step-00000012")
    assert "step-00000008" in run([*arguments, "--resume"], processes)
    assert log_of(tmp_path / "all") == whole


def test_gradients_are_averaged_once_an_update(train, inputs, tmp_path):
    """DDP's communication hook runs for a bucket of gradients after the last micro-batch, and not before."""
    from training import model, processes, settings

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        asked = settings.parse(options(inputs, tmp_path), "")
        group = torch.distributed.new_group()
        alone = processes.Processes(0, 1, torch.device("cpu"), group)
        parallel = model.ParallelModel(
            model.make_model(model.make_config(asked, 257, 256), asked), asked, alone
        )
        calls = []

        def count(state: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
            calls.append(bucket.index())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        parallel.module.register_comm_hook(None, count)
        parallel.warm_up(torch.zeros(1, 8, dtype=torch.int64))
        calls.clear()
        for part in range(3):
            with parallel.synchronised(last=part == 2):
                parallel.loss(torch.full((1, 8), part)).backward()
            assert calls == ([0] if part == 2 else [])
    finally:
        torch.distributed.destroy_process_group()


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 5}, "--batch: expected a multiple of --micro-batch 2 times 1 process, got 5"),
        ({"seq_len": 1}, "--seq-len: expected at least 2, one token to predict, got 1"),
        ({"seq_len": "many"}, "argument --seq-len: invalid number value: 'many'"),
        ({"micro_batch": 0}, "--micro-batch: expected at least 1, got 0"),
        ({"tokens": 100, "warmup_tokens": 200}, "--warmup-tokens: expected fewer than --tokens 100, got 200"),
        ({"tokens": None, "warmup_tokens": 10**9}, "--warmup-tokens: expected fewer than the "),
        ({"lr": "nan"}, "--lr: expected a positive number, got nan"),
        ({"min_lr_ratio": 1.5}, "--min-lr-ratio: expected 0 to 1, got 1.5"),
        ({"files": "missing/*.txt"}, "--files: there is no file missing/*.txt"),
        ({"files": None}, "one of the arguments --files --dataset is required"),
        ({"eval_files": "missing.txt"}, "--eval-files: there is no file missing.txt"),
        ({"eval_split": "test"}, "--dataset-config and --eval-split: of --dataset, which is not given"),
        ({"config": "missing.json"}, "--config missing.json: "),
        ({"layers": 3, "set": "num_hidden_layers=2"}, "--layers and --set num_hidden_layers=... say"),
        ({"set": "colour=1"}, "--set colour: LlamaConfig has no such field"),
        ({"set": "colour"}, "--set: expected KEY=VALUE, got 'colour'"),
        ({"set": "num_attention_heads=3"}, "--config "),
        ({"set": "vocab_size=100"}, "--set vocab_size=100: the tokenizer has 257 tokens"),
        ({"tokenizer": "/missing/tokenizer"}, "--tokenizer /missing/tokenizer: "),
        ({"seq_len": 20_000}, "the data have 1 sequences of --seq-len 20000 tokens: too few"),
        ({"tokens": None, "batch": 4000}, "sequences to train on, fewer than --batch 4000"),
        ({"parallel": "fsdp"}, "--parallel fsdp: start it with torchrun"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(train, inputs, tmp_path, capsys, changes, message):
    arguments = options(inputs, tmp_path / "out", **changes)
    assert train.main(arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1].rpartition("\r")[2].strip()
    assert said.startswith("train.py: error: ") and message in said
    assert not (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "out" / "log.jsonl").exists()


def test_an_output_that_cannot_be_written_is_refused(train, inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(options(inputs, tmp_path / "file" / "out")) == 2
    assert "cannot write there (Not a directory)" in capsys.readouterr().err


def test_another_runs_output_is_refused_without_resume(train, inputs, finished, capsys):
    assert train.main(options(inputs, finished, "dropout.json")) == 2
    assert "has checkpoints; go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 16}, "seq_len was 32, is 16"),
        ({"batch": 8}, "batch was 4, is 8"),
        ({"seed": 4}, "seed was 3, is 4"),
        ({"layers": 3}, "the model's num_hidden_layers was 2, is 3"),
        ({"data_tokens": 9000}, "the data changed"),
        ({"config": "plain.json"}, "the model's attention_dropout was 0.1, is 0.0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_resuming_as_another_run_is_refused(train, inputs, finished, capsys, changes, message):
    before = log_of(finished)
    arguments = options(inputs, finished, **{"config": "dropout.json", "resume": True, **changes})
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert "--resume: step-00000040 is of another run: " in said and message in said
    assert log_of(finished) == before


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'{"words": "no text"}\n', b'{"text": 3}\n', b"text\n"])
def test_unreadable_data_are_refused(train, inputs, tmp_path, capsys, content):
    path = tmp_path / ("bad.txt" if content[0] == 255 else "bad.jsonl")
    path.write_bytes(content)
    assert train.main(options(inputs, tmp_path / "out", files=path)) == 2
    assert f"{path}" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "tokens").iterdir()), "nothing half done is left in the cache"


def test_a_loss_that_is_not_finite_stops_the_run(train, inputs, tmp_path, capsys):
    """Steps of 1e20 leave finite weights once; the loss of the next update is not, and changes nothing."""
    assert train.main(options(inputs, tmp_path, lr=1e20, warmup_tokens=0, save_every=1)) == 1
    said = capsys.readouterr().err
    assert "of update 2 is " in said and "the newest checkpoint is " in said
    assert checkpoints_of(tmp_path) == ["step-00000001"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-00000001")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_weights_that_are_not_finite_are_not_saved(train, inputs, tmp_path, capsys, monkeypatch):
    from training.model import ParallelModel

    def spoiled(self, largest: float) -> float:
        next(self.bare.parameters()).data[0] = torch.nan
        return 1.0

    monkeypatch.setattr(ParallelModel, "clip", spoiled)
    assert train.main(options(inputs, tmp_path, save_every=1)) == 1
    assert "not finite after update 1, which is not saved" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


# ---- parts -------------------------------------------------------------------------------------------------


def test_learning_rate_rises_falls_and_stays(train):
    from training.schedule import WarmupCosine

    factor = WarmupCosine(tokens_per_update=10, warmup_tokens=40, total_tokens=240, floor=0.1)
    assert [factor(update) for update in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(13) == pytest.approx(0.55), "the middle of the cosine"
    assert factor(8) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factor(23) == factor(24) == factor(1000) == 0.1
    assert WarmupCosine(10, 0, 20, 0.0)(0) == pytest.approx(0.5), "without a warm-up"


def test_only_matrices_without_a_mark_decay(train):
    from training.schedule import make_optimizer, names_with_decay

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
            self.marked = nn.Parameter(torch.ones(2, 2))
            self.marked._no_weight_decay = True

    model = Model()
    assert names_with_decay(model) == {"linear.weight"}
    optimizer = make_optimizer(model, names_with_decay(model), lr=1.0, weight_decay=0.1, fused=False)
    decays = {id(x): group["weight_decay"] for group in optimizer.param_groups for x in group["params"]}
    assert {name: decays[id(x)] for name, x in model.named_parameters()} == {
        "linear.weight": 0.1, "linear.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "marked": 0.0,
    }  # fmt: skip


def read_tokens(folder: Path) -> list[int]:
    corpus = json.loads((folder / "corpus.json").read_text())
    tokens = np.fromfile(folder / "tokens.bin", corpus["dtype"]).tolist()
    assert len(tokens) == corpus["tokens"]
    return tokens


def test_documents_are_packed_with_an_end_after_each(train, tmp_path, monkeypatch):
    from training import data

    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n\n{"text": ""}\n{"text": "é"}\n')
    (tmp_path / "b.txt").write_text("line\n" * 5)
    (tmp_path / "c.txt").write_text("")
    source = data.Files((str(tmp_path / "*.jsonl"), str(tmp_path / "*.txt")), "text")
    expected = [*b"ab", 256, 256, *"é".encode(), 256, *b"line\n" * 5, 256]
    folder = data.tokenised(source, data.Bytes(), None, tmp_path / "cache", "")
    assert read_tokens(folder) == expected
    monkeypatch.setattr(data, "PIECE", 7)
    monkeypatch.setattr(data, "TOGETHER", 3)
    assert read_tokens(data.tokenised(source, data.Bytes(), None, tmp_path / "pieces", "")) == expected
    assert read_tokens(data.tokenised(source, data.Bytes(), 9, tmp_path / "cache", "")) == expected[:9]

    sequences = data.Sequences(folder, 4)
    rows = sequences.read(np.array([1, 0]), torch.device("cpu"))
    assert rows.tolist() == [expected[4:8], expected[:4]] and rows.dtype == torch.int64
    assert (
        len(sequences) == len(expected) // 4 and len(data.Sequences(folder, 4, 2)) == len(expected) // 4 - 2
    )
    assert len(data.Sequences(folder, 1000)) == 0


def test_text_is_tokenised_once_until_it_changes(train, tmp_path, monkeypatch):
    from training import data

    path = write_text(tmp_path / "a.txt", seed=1, words=100)
    source = data.Files((str(path),), "text")
    folder = data.tokenised(source, data.Bytes(), None, tmp_path / "cache", "")
    with monkeypatch.context() as patch:
        patch.setattr(data.Files, "pieces", lambda self: pytest.fail("read again"))
        assert data.tokenised(source, data.Bytes(), None, tmp_path / "cache", "") == folder
    write_text(path, seed=2, words=110)
    other = data.tokenised(source, data.Bytes(), None, tmp_path / "cache", "")
    assert other != folder and bytes(read_tokens(other)[:-1]) == path.read_bytes()


def test_the_order_is_a_permutation_of_every_epoch_however_it_is_cut(train):
    from training.data import ShuffledOrder

    order = ShuffledOrder(10, seed=5)
    whole = order(0, 35).tolist()
    assert [sorted(whole[begin : begin + 10]) for begin in (0, 10, 20)] == [list(range(10))] * 3
    assert len({tuple(whole[begin : begin + 10]) for begin in (0, 10, 20)}) == 3
    assert [x for begin in range(0, 35, 7) for x in order(begin, begin + 7)] == whole
    assert ShuffledOrder(10, seed=5)(13, 29).tolist() == whole[13:29]
    assert ShuffledOrder(10, seed=6)(0, 35).tolist() != whole


def test_a_tokenizer_from_a_folder_trains_and_is_saved(train, inputs, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: n for n, word in enumerate([*WORDS, "<e>"])}, unk_token="<e>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    for name, special in (("without", {}), ("with", {"eos_token": "<e>"})):
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
        fast.save_pretrained(tmp_path / name)
    asked = {"tokens": 2 * 4 * 32, "warmup_tokens": 0}
    assert train.main(options(inputs, tmp_path / "out", tokenizer=tmp_path / "without", **asked)) == 2
    assert "it has no EOS token" in capsys.readouterr().err
    assert train.main(options(inputs, tmp_path / "out", tokenizer=tmp_path / "with", **asked)) == 0
    (corpus,) = (tmp_path / "out" / "tokens").iterdir()
    texts = [(inputs / name).read_text().split() for name in ("one.txt", "two.txt")]
    end = len(WORDS)
    expected = [*(WORDS.index(x) for x in texts[0]), end, *(WORDS.index(x) for x in texts[1]), end]
    assert read_tokens(corpus) == expected
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "checkpoints" / "step-00000002")
    assert saved("quick fox").input_ids == [1, 3]


@pytest.mark.parametrize("saved", [False, True], ids=["folder of jsonl", "saved to disk"])
def test_a_dataset_of_hugging_face_is_read(train, tmp_path, monkeypatch, saved):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    from training import data
    from training.settings import Refusal

    rows = {"text": ["one", "two", "three"], "other": [1, 2, 3]}
    folder = tmp_path / "set"
    dataset = datasets.Dataset.from_dict(rows)
    if saved:
        datasets.DatasetDict({"train": dataset}).save_to_disk(folder)
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dataset))
    source = data.Dataset(str(folder), None, "train", "text")
    assert list(source.pieces()) == [("one", True), ("two", True), ("three", True)]
    with pytest.raises(Refusal, match="has no 'body' but 'text', 'other'"):
        list(data.Dataset(str(folder), None, "train", "body").pieces())
    with pytest.raises(Refusal, match="--dataset"):
        list(data.Dataset(str(folder), None, "missing", "text").pieces())


def test_held_out_files_take_nothing_from_the_data(train, inputs, tmp_path, capsys):
    write_text(tmp_path / "held.txt", seed=9, words=200)
    asked = {"files": inputs / "one.txt", "eval_files": tmp_path / "held.txt", "eval_sequences": 1000}
    assert train.main(options(inputs, tmp_path / "out", **asked, tokens=2 * 4 * 32, warmup_tokens=0)) == 0
    said = capsys.readouterr().out
    bytes_of = {path.stem: path.stat().st_size for path in (inputs / "one.txt", tmp_path / "held.txt")}
    assert f"{(bytes_of['one'] + 1) // 32} sequences of 32 tokens to train on" in said
    assert f"{(bytes_of['held'] + 1) // 32} held out" in said


def test_configurations_by_file_and_folder_with_changes(train, inputs, tmp_path):
    from training import model, settings

    write_config(tmp_path / "config.json")
    for config in (tmp_path, tmp_path / "config.json"):
        arguments = options(inputs, tmp_path, config=str(config), layers=5, set="hidden_act=gelu")
        made = model.make_config(settings.parse(arguments, ""), vocabulary=257, eos=256)
        assert (made.num_hidden_layers, made.hidden_act, made.vocab_size) == (5, "gelu", 320)
        assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (None, 256, None)


# ---- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("config, processes", [("tiny", 0), ("hybrid.json", 1)], ids=["alone", "torchrun"])
def test_a_run_on_a_gpu_learns_and_goes_on_with_the_same_bits(inputs, tmp_path, config, processes):
    """This package's model on its kernels, under autocast; a kill at update 27 of 40 leaves 20 of them."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    fields = {"model_type": "gated_deltanet2", "hidden_size": 128, "num_heads": 2, "head_dim": 64}
    fields |= {"num_hidden_layers": 2, "intermediate_size": 256, "attention_every": 2, "sliding_window": 64}
    (inputs / "hybrid.json").write_text(json.dumps(fields))
    sizes = {"seq_len": 128, "tokens": 40 * 4 * 128, "warmup_tokens": 4 * 4 * 128, "lr": 3e-3}
    arguments = {"config": config, "device": "cuda", **sizes}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(options(inputs, whole, **arguments), processes)
    losses = losses_of(whole)
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.8 * losses[0]
    shutil.copytree(whole, killed)
    for step in (30, 40):
        shutil.rmtree(killed / "checkpoints" / f"step-{step:08}")
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    (killed / "log.jsonl").write_text("".join(x for x in lines if json.loads(x)["step"] <= 27))
    assert "resumed from" in run([*options(inputs, killed, **arguments), "--resume"], processes)
    assert log_of(killed) == log_of(whole)
    last = [output / "checkpoints" / "step-00000040" / "model.safetensors" for output in (killed, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()
