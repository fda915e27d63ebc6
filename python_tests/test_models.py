"""The language model in Hugging Face's conventions."""

import compare
import pytest
import safetensors.torch
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the models need transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from gdn2_ext import GatedDeltaNet2
from gdn2_ext.models import GatedDeltaNet2Cache, GatedDeltaNet2Config, GatedDeltaNet2ForCausalLM
from gdn2_ext.models.attention import RotaryRMSNorm, SlidingWindowAttention

HYBRID = {"attention_every": 2, "sliding_window": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {
    "recurrent": {},
    "hybrid": HYBRID,
    "attention_first": {**HYBRID, "layer_types": ["sliding_attention", "linear_attention"]},
    "tied": {"tie_word_embeddings": True, "variant": "kda", "num_v_heads": 4},
}
GENERATION = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=KINDS)
def model(request, backend, seed) -> GatedDeltaNet2ForCausalLM:
    torch.manual_seed(seed)
    config = GatedDeltaNet2Config.named("tiny", backend=backend.name, **KINDS[request.param])
    return AutoModelForCausalLM.from_config(config).to(backend.device, backend.dtype).eval()


@pytest.fixture
def tokens(backend, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 257, (3, 40), generator=generator).to(backend.device)


def assert_same_tokens(backend, model, actual, expected, prompt: int) -> None:
    """In 16 bits two ways to compute the logits may choose another token where two are nearly as likely."""
    if backend.dtype not in (torch.bfloat16, torch.float16):
        assert torch.equal(actual, expected)
        return
    for row, (a, b) in enumerate(zip(actual, expected)):
        differing = (a != b).nonzero()
        if len(differing):
            first = int(differing[0])
            assert first >= prompt, f"row {row}: the prompt changed"
            logits = model(b[None, :first], use_cache=False).logits[0, -1].float()
            gap = (logits[b[first]] - logits[a[first]]).abs()
            assert gap < 0.02 * logits.std(), (
                f"row {row}, token {first}: {int(a[first])} instead of {int(b[first])}"
            )


def recomputed(model, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy tokens, each from the whole sequence before it."""
    with torch.no_grad():
        for _ in range(count):
            logits = model(tokens, use_cache=False).logits[:, -1:]
            tokens = torch.cat([tokens, logits.argmax(-1)], 1)
    return tokens


# -- generation ----------------------------------------------------------------------------------------------


def test_generation_is_full_recomputation(backend, model, tokens):
    generated = model.generate(tokens, max_new_tokens=24, **GENERATION)
    assert_same_tokens(backend, model, generated, recomputed(model, tokens, 24), 40)


def test_padded_prompts_generate_what_they_generate_alone(backend, model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=20, **GENERATION)
    alone = model.generate(tokens[:1, 13:], max_new_tokens=20, **GENERATION)
    assert_same_tokens(backend, model, together[:1, 13:], alone, 27)
    without = model.generate(tokens[1:], max_new_tokens=20, **GENERATION)
    assert_same_tokens(backend, model, together[1:], without, 40)


@pytest.mark.most_exact_dtype
def test_beams_carry_their_states(backend, model, tokens):
    if backend.name == "cuda":
        pytest.skip("beams part where two are nearly as likely: compared on the torch backend")
    options = {"max_new_tokens": 10, "num_beams": 3, **GENERATION}
    cached, whole = (model.generate(tokens, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole)


@torch.no_grad()
def test_a_prompt_in_segments_gives_the_same_logits(backend, model, tokens):
    cache, parts = GatedDeltaNet2Cache(model.config), []
    for begin, end in ((0, 25), (25, 26), (26, 40)):
        parts.append(model(tokens[:, begin:end], past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 40
    bar = 3e-2 if backend.dtype in (torch.bfloat16, torch.float16) else 1e-5
    compare.assert_close(torch.cat(parts, 1), model(tokens).logits, bar, "logits")


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(backend, model, tokens):
    offsets = torch.tensor([0, 11, 11, 40])
    packed = model(tokens[:1], cu_seqlens=offsets.to(backend.device), cu_seqlens_cpu=offsets).logits
    alone = [model(tokens[:1, begin:end]).logits for begin, end in ((0, 11), (11, 40))]
    bar = 3e-2 if backend.dtype in (torch.bfloat16, torch.float16) else 1e-5
    compare.assert_close(packed, torch.cat(alone, 1), bar, "logits")
    for training in (False, True):  # the loss of logits, and in pieces
        parts = [model.train(training)(x, labels=x).loss for x in (tokens[:1, :11], tokens[:1, 11:])]
        loss = model(tokens[:1], labels=tokens[:1], cu_seq_lens_q=offsets.to(backend.device)).loss
        torch.testing.assert_close(loss, (10 * parts[0] + 28 * parts[1]) / 38, rtol=bar, atol=bar)


def test_a_recurrent_state_does_not_go_back(model):
    with pytest.raises(NotImplementedError, match="cannot go back"):
        GatedDeltaNet2Cache(model.config).crop(-1)


# -- checkpoints and training --------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(backend, model, tokens, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(backend.device, backend.dtype)
    assert isinstance(loaded, GatedDeltaNet2ForCausalLM)
    elsewhere = {"dtype": None, "_name_or_path": None}
    assert loaded.config.to_dict() | elsewhere == model.config.to_dict() | elsewhere
    for name, x in model.state_dict().items():
        compare.assert_bitwise_equal(loaded.state_dict()[name], x, name)
    compare.assert_bitwise_equal(loaded.eval()(tokens).logits, model(tokens).logits, "logits")


@torch.no_grad()
def test_what_a_checkpoint_lacks_starts_as_in_a_new_model(tmp_path):
    config = GatedDeltaNet2Config.named("tiny", conv_bias=True)
    GatedDeltaNet2ForCausalLM(config).save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    lacking = ("o_norm", "q_conv1d", "k_conv1d.bias", "dt_bias", "attn_norm")
    kept = {name: x for name, x in weights.items() if not any(part in name for part in lacking)}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, x in loaded.items():
        if name in kept:
            compare.assert_bitwise_equal(x, kept[name], name)
        elif "norm" in name:
            assert (x == 1).all(), name
        elif "dt_bias" in name:
            step = functional.softplus(x)
            assert (step >= 0.9e-3).all() and (step <= 0.11).all(), name
        else:
            assert (x.abs() <= 0.5).all(), name  # width 4: within 1 / sqrt(4)


def gradients(model, tokens, **options) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    loss = model(tokens, labels=tokens, **options).loss
    loss.backward()
    return loss.detach(), {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("change", ["whole_loss", "checkpointing", "num_items"])
def test_ways_to_train_give_the_same_gradients(backend, model, tokens, change):
    model.train()
    expected, expected_gradients = gradients(model, tokens)
    options = {}
    if change == "whole_loss":
        model.config.use_chunked_loss = False
    elif change == "checkpointing":
        model.gradient_checkpointing_enable()
    else:
        options["num_items_in_batch"] = tokens.shape[0] * (tokens.shape[1] - 1)
    loss, actual = gradients(model, tokens, **options)
    bar = 2e-2 if backend.dtype in (torch.bfloat16, torch.float16) else 1e-5
    compare.assert_close(loss, expected, bar, "loss")
    for name, x in actual.items():
        compare.assert_close(x, expected_gradients[name], bar, name)


def test_the_loss_is_that_of_the_next_token(backend, model, tokens):
    labels = tokens.clone()
    labels[0, :20] = -100
    output = model(tokens, labels=labels)
    expected = functional.cross_entropy(output.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    compare.assert_close(output.loss.detach(), expected.detach(), 1e-6, "loss")
    assert model(tokens, logits_to_keep=2).logits.shape == (3, 2, 257)


class CastCounter(TorchDispatchMode):
    """How often a float32 tensor of a shape is cast to another dtype."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.number = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.number += args[0].dtype == torch.float32 and kwargs.get("dtype") is not None
        return function(*args, **kwargs)


def test_autocast_casts_what_a_block_reads_once():
    """What the mixer and the MLP read, of every block, and what the head reads: not for every linear."""
    config = GatedDeltaNet2Config.named("tiny", hidden_size=96, **HYBRID)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), CastCounter((1, 35, 96)) as casts:
        model(torch.arange(35).unsqueeze(0), use_cache=False)
    assert casts.number == 2 * config.num_hidden_layers + 1


def test_positions_rotate_normalised_channels(backend, seed):
    x = backend.normal(2, 3, 40, 16, seed=seed, dtype=backend.dtype)
    norm = RotaryRMSNorm(16, 1e-5).to(x)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    positions = torch.arange(7, 47, device=backend.device)
    pairs = functional.rms_norm(x.double(), (16,), norm.weight.double(), 1e-5).unflatten(-1, (2, 8))
    angles = positions.unsqueeze(-1) * 10000.0 ** (-torch.arange(8, device=backend.device).double() / 8)
    turned = torch.complex(pairs[..., 0, :], pairs[..., 1, :]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    bar = 1e-5 if backend.dtype == torch.float32 else 4e-3
    compare.assert_close(norm(x, positions, 1e4).detach(), expected, bar, "x")


def test_the_norms_of_attention_have_the_models_epsilon():
    config = GatedDeltaNet2Config.named("tiny", norm_eps=1e-3, **HYBRID)
    attention = AutoModelForCausalLM.from_config(config).model.layers[1].attn
    assert attention.q_norm.eps == attention.k_norm.eps == 1e-3


# -- configuration -------------------------------------------------------------------------------------------


def test_the_configuration_is_known_by_its_type():
    config = AutoConfig.for_model("gated_deltanet2", num_hidden_layers=4, attention_every=2)
    assert config.layer_types == ["linear_attention", "sliding_attention"] * 2
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config).model.layers
    assert [type(layer.attn) for layer in layers] == [GatedDeltaNet2, SlidingWindowAttention] * 2


@pytest.mark.parametrize("name", ["1.3b", "1.3b-hybrid"])
def test_the_papers_sizes(name):
    config = GatedDeltaNet2Config.named(name)
    with torch.device("meta"):
        parameters = sum(x.numel() for x in GatedDeltaNet2ForCausalLM(config).parameters())
    assert parameters == pytest.approx(1.33e9, rel=0.03)
    assert config.num_heads * config.head_dim**2 == 262144 and config.sliding_window == 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_types": ["attention"] * 2}, "layer_types: expected 2 of 'linear_attention' or"),
        ({"layer_types": ["linear_attention"]}, "layer_types: expected 2 of"),
        ({**HYBRID, "num_attention_heads": 3}, "num_attention_heads: expected heads of an even size in 64"),
        ({**HYBRID, "num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of 4, got 3"),
        ({**HYBRID, "sliding_window": 0}, "sliding_window: expected at least 1 token, got 0"),
        ({"attention_every": -1}, "attention_every: expected up to 2 layers, or 0 for none.*, got -1"),
        ({"attention_every": 3}, "attention_every: expected up to 2 layers, or 0 for none.*, got 3"),
        ({"head_dim": 0}, "head_dim: expected at least 1, got 0"),
        ({"num_heads": 0}, "num_heads: expected at least 1, got 0"),
        ({"num_v_heads": 3}, "num_v_heads: expected a multiple of num_heads 2, got 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1, got 0"),
        ({"vocab_size": -1}, "vocab_size: expected at least 1, got -1"),
        ({"variant": "foo"}, "variant: expected one of gdn2, .*, got 'foo'"),
        ({"gate_activation": "relu"}, "gate_activation: expected one of silu, .*, got 'relu'"),
        ({"backend": "x"}, "backend: expected one of auto, cuda, torch, got 'x'"),
    ],
)
def test_bad_configurations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet2Config.named("tiny", **options)
    with pytest.raises(ValueError, match="name: expected one of"):
        GatedDeltaNet2Config.named("13b")


def test_bad_calls_are_refused(model, tokens):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="logits_to_keep: expected 0 with labels"):
        model(tokens, labels=tokens, logits_to_keep=1)
    with pytest.raises(ValueError, match=r"labels: expected \(3, 40\), got \(3, 39\)"):
        model(tokens, labels=tokens[:, 1:])
    with pytest.raises(TypeError, match="attention_maks: not an argument of GatedDeltaNet2Model.forward"):
        model(tokens, attention_maks=None)
    with pytest.raises(TypeError, match="past_key_values: expected a GatedDeltaNet2Cache or None, got Dyn"):
        model(tokens, past_key_values=DynamicCache())
    for shape in ((3, 1), (1, 40), (2, 40)):
        with pytest.raises(ValueError, match=r"attention_mask: expected \[3, 40\] or longer"):
            model(tokens, attention_mask=torch.ones(*shape))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="use_cache: expected False with gradient checkpointing, got True"):
        model.train()(tokens, use_cache=True)
