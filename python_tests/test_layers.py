"""The layer against its definition and its relatives' recurrences written out, and against FLA's layer."""

import importlib.util
import math

import compare
import pytest
import torch
from torch.nn import functional

from gdn2_ext import GatedDeltaNet2, RecurrentCache, modules
from gdn2_ext.layers import VARIANTS

HIDDEN, HEADS, DIM = 64, 2, 32
KINDS = {
    "plain": {},
    "groups": {"num_v_heads": 4, "expand_v": 2.0},
    "conv_bias": {"conv_bias": True, "allow_neg_eigval": True, "gate_activation": "silu"},
    "no_conv": {"use_short_conv": False},
    **{name: {"variant": name, "num_v_heads": 4} for name in VARIANTS if name != "gdn2"},
}
# Relative L2 errors of a layer's output. In bfloat16 the linears round as well as the op.
BARS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=KINDS)
def options(request) -> dict:
    return KINDS[request.param]


def make_layer(backend, seed: int, /, **options) -> GatedDeltaNet2:
    torch.manual_seed(seed)
    options = {"layer_idx": 0, "backend": backend.name, **options}
    layer = GatedDeltaNet2(HIDDEN, head_dim=DIM, num_heads=HEADS, **options)
    return layer.to(backend.device, backend.dtype)


def make_x(backend, seed: int, batch: int = 2, seqlen: int = 150) -> torch.Tensor:
    return backend.normal(batch, seqlen, HIDDEN, seed=seed, dtype=backend.dtype)


def assert_same(backend, actual, expected, name="o") -> None:
    compare.assert_close(actual, expected, BARS[backend.dtype], name)


# -- the definition ------------------------------------------------------------------------------------------


def convolved(x, weight, bias):
    """silu(sum_j weight[j] x[t - width + 1 + j]) token by token; x [T, D], weight [D, width]."""
    width = weight.shape[1]
    rows = []
    for t in range(x.shape[0]):
        y = 0 if bias is None else bias
        for j in range(width):
            if t - width + 1 + j >= 0:
                y = y + weight[:, j] * x[t - width + 1 + j]
        rows.append(functional.silu(torch.as_tensor(y)))
    return torch.stack(rows)


def written_out(layer: GatedDeltaNet2, x: torch.Tensor) -> torch.Tensor:
    """The layer's output of a sequence x [T, hidden_size] in float64, from the recurrences as published."""
    p = {name: value.double() for name, value in layer.state_dict().items()}
    x, gates, groups = x.double(), VARIANTS[layer.variant], layer.num_v_heads // layer.num_heads

    def project(name):
        y = x @ p[f"{name}_proj.weight"].T
        if f"{name}_conv1d.weight" not in p:
            return functional.silu(y)
        return convolved(y, p[f"{name}_conv1d.weight"][:, 0], p.get(f"{name}_conv1d.bias"))

    q, k = (
        project("q").unflatten(-1, (layer.num_heads, -1)),
        project("k").unflatten(-1, (layer.num_heads, -1)),
    )
    v = project("v").unflatten(-1, (layer.num_v_heads, -1))
    if gates.use_qk_l2norm:
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    alpha = torch.ones_like(k)
    if gates.decay == "channel":
        f = x @ p["f_proj.0.weight"].T @ p["f_proj.1.weight"].T + p["dt_bias"]
        f = f.unflatten(-1, (layer.num_heads, -1))
        alpha = torch.exp(-p["A_log"].exp()[:, None] * functional.softplus(f))
    elif gates.decay == "head":
        f = x @ p["f_proj.weight"].T + p["dt_bias"]
        alpha = torch.exp(-p["A_log"].exp() * functional.softplus(f)).unsqueeze(-1) * alpha
    scale = 2 if layer.allow_neg_eigval else 1
    beta = scale * torch.sigmoid(x @ p["b_proj.weight"].T) if gates.erase != "none" else None
    w = torch.sigmoid(x @ p["w_proj.weight"].T) if gates.write == "channel" else None
    S = torch.zeros(
        layer.num_v_heads, layer.head_k_dim, layer.head_v_dim, dtype=torch.float64, device=x.device
    )
    rows = []
    for t in range(x.shape[0]):
        for head in range(layer.num_v_heads):
            i = head // groups
            k_t, v_t, S_t = k[t, i], v[t, head], alpha[t, i][:, None] * S[head]
            if gates.erase == "channel":  # (I - k (b*k)^T) Diag(alpha) S + k (w*v)^T
                b_t, w_t = beta[t].view(layer.num_heads, -1)[i], w[t].view(layer.num_v_heads, -1)[head]
                S[head] = S_t - torch.outer(k_t, (b_t * k_t) @ S_t) + torch.outer(k_t, w_t * v_t)
            elif gates.erase == "head":  # (I - beta k k^T) Diag(alpha) S + beta k v^T
                S[head] = S_t + beta[t, i] * torch.outer(k_t, v_t - k_t @ S_t)
            else:  # Diag(alpha) S + k v^T
                S[head] = S_t + torch.outer(k_t, v_t)
        rows.append(torch.stack([q[t, head // groups] @ S[head] for head in range(layer.num_v_heads)]))
    o = layer.head_k_dim**-0.5 * torch.stack(rows)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * p["o_norm.weight"]
    gate = x @ p["g_proj.0.weight"].T @ p["g_proj.1.weight"].T + p["g_proj.1.bias"]
    o = o * modules.ACTIVATIONS[layer.o_norm.activation](gate.unflatten(-1, (layer.num_v_heads, -1)))
    return o.flatten(-2) @ p["o_proj.weight"].T


@torch.no_grad()
def test_the_layer_is_its_definition(backend, options, seed):
    layer, x = make_layer(backend, seed, **options), make_x(backend, seed)
    assert_same(backend, layer(x)[0][0], written_out(layer, x[0]))


def test_every_parameter_gets_a_finite_gradient(backend, options, seed):
    layer, x = make_layer(backend, seed, **options), make_x(backend, seed)
    layer(x)[0].float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.gpu
def test_gradients_are_those_of_the_torch_backend(hopper, seed):
    ours, x = make_layer(hopper, seed, num_v_heads=4), make_x(hopper, seed)
    theirs = make_layer(hopper, seed, num_v_heads=4, backend="torch").double()
    do = hopper.normal(*x.shape, seed=seed + 1)
    ours(x)[0].backward(do.to(x.dtype))
    theirs(x.double())[0].backward(do.double())
    for name, parameter in ours.named_parameters():
        compare.assert_close(parameter.grad, theirs.get_parameter(name).grad, 3e-2, name)


# -- segments, padding, packing ------------------------------------------------------------------------------


@torch.no_grad()
def test_segments_and_single_tokens_continue_the_sequence(backend, options, seed):
    layer, x = make_layer(backend, seed, **options), make_x(backend, seed)
    cache, parts = RecurrentCache(1), []
    for begin, end in ((0, 100), (100, 101), (101, 103), (103, 140), (140, 150)):
        parts.append(layer(x[:, begin:end], past_key_values=cache, use_cache=True)[0])
        assert cache.get_seq_length() == end
    assert_same(backend, torch.cat(parts, 1), layer(x)[0])


@torch.no_grad()
def test_the_state_of_single_tokens_keeps_its_address(backend, seed):
    """So that a step can be captured in a CUDA graph."""
    layer, x = make_layer(backend, seed), make_x(backend, seed, seqlen=20)
    cache = RecurrentCache(1)
    addresses = set()
    for t in range(17):
        layer(x[:, t : t + 1] if t else x[:, :10], past_key_values=cache, use_cache=True)
        addresses.add(
            (cache.layers[0].S.data_ptr(), *(y.data_ptr() for y in cache.layers[0].inputs.values()))
        )
    assert len(addresses) == 1


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(backend, options, seed):
    layer, x = make_layer(backend, seed, **options), make_x(backend, seed)
    mask = torch.ones(2, 150, device=backend.device)
    mask[0, :37] = 0
    o = layer(x, attention_mask=mask)[0]
    assert_same(backend, o[0, 37:], layer(x[:1, 37:])[0][0])
    assert_same(backend, o[1], layer(x)[0][1])


@torch.no_grad()
def test_padding_on_the_right_leaves_the_state(backend, options, seed):
    layer, x = make_layer(backend, seed, **options), make_x(backend, seed)
    mask = torch.ones(2, 120, device=backend.device)
    mask[0, 90:] = 0
    cache = RecurrentCache(1)
    layer(x[:, :120], attention_mask=mask, past_key_values=cache, use_cache=True)
    o = layer(x[:, 120:], past_key_values=cache, use_cache=True)[0]
    assert_same(backend, o[0], layer(torch.cat([x[:1, :90], x[:1, 120:]], 1))[0][0, 90:])
    assert_same(backend, o[1], layer(x)[0][1, 120:])


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(backend, options, seed):
    layer, x = make_layer(backend, seed, **options), make_x(backend, seed, batch=1)
    offsets = [0, 2, 37, 37, 100, 150]
    cu_seqlens = torch.tensor(offsets, device=backend.device)
    alone = [layer(x[:, begin:end])[0] for begin, end in zip(offsets, offsets[1:]) if end > begin]
    o = layer(x, cu_seqlens=cu_seqlens, cu_seqlens_cpu=torch.tensor(offsets))[0]
    assert_same(backend, o, torch.cat(alone, 1))


@torch.no_grad()
def test_chunks_and_the_recurrence_agree(backend, options, seed):
    chunk, x = make_layer(backend, seed, **options), make_x(backend, seed)
    recurrent = make_layer(backend, seed, mode="fused_recurrent", **options)
    assert_same(backend, recurrent(x)[0], chunk(x)[0])


def test_a_state_goes_on_with_the_rows_that_are_asked_for(backend, seed):
    layer, x = make_layer(backend, seed), make_x(backend, seed)
    rows = torch.tensor([1, 1, 0], device=backend.device)
    with torch.no_grad():
        cache = RecurrentCache(1)
        layer(x[:, :140], past_key_values=cache, use_cache=True)
        cache.layers[0].select(rows)
        o = layer(x[rows, 140:], past_key_values=cache, use_cache=True)[0]
        assert_same(backend, o, layer(x)[0][rows, 140:])


# -- arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "parallel"}, "mode: expected 'chunk' or 'fused_recurrent', got 'parallel'"),
        ({"variant": "rwkv"}, "variant: expected one of gdn2, kda, .*, got 'rwkv'"),
        ({"expand_v": 0.3}, "expand_v: expected a whole number of value channels a head, got 0.3"),
        ({"num_v_heads": 3}, "num_v_heads: expected a multiple of num_heads 2, got 3"),
        ({"gate_activation": "relu"}, "gate_activation: expected one of silu, swish, sigmoid, got 'relu'"),
        ({"conv_size": 0}, "conv_size: expected at least 1, got 0"),
        ({"backend": "foo"}, "backend: expected one of auto, cuda, torch, got 'foo'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GatedDeltaNet2(HIDDEN, head_dim=DIM, num_heads=HEADS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": "2"}, "num_heads: expected a whole number, got '2'"),
        ({"head_dim": 32.0}, "head_dim: expected a whole number, got 32.0"),
        ({"num_v_heads": 4.0}, "num_v_heads: expected a whole number or None, got 4.0"),
    ],
)
def test_options_of_other_types_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        GatedDeltaNet2(HIDDEN, **{"head_dim": DIM, "num_heads": HEADS} | options)


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
def test_offsets_are_checked_in_both_modes(mode):
    layer, x = GatedDeltaNet2(HIDDEN, head_dim=DIM, num_heads=HEADS, mode=mode), torch.zeros(1, 4, HIDDEN)
    with torch.no_grad():
        with pytest.raises(TypeError, match="cu_seqlens: expected a torch.Tensor"):
            layer(x, cu_seqlens=[0, 4])
        for wrong in ([0, 3], [0, 2, 4]):
            with pytest.raises(ValueError, match="cu_seqlens_cpu: expected"):
                layer(x, cu_seqlens=torch.tensor([0, 4]), cu_seqlens_cpu=torch.tensor(wrong))


def test_bad_calls_are_refused():
    layer, x = GatedDeltaNet2(HIDDEN, head_dim=DIM, num_heads=HEADS), torch.zeros(1, 4, HIDDEN)
    cu_seqlens = torch.tensor([0, 4])
    with pytest.raises(TypeError, match="hidden_states: expected a torch.Tensor, got NoneType"):
        layer(None)
    with pytest.raises(ValueError, match="layer_idx: expected this layer's index in the cache"):
        layer(x, past_key_values=RecurrentCache(1))
    with pytest.raises(ValueError, match="attention_mask: expected"):
        layer(x, attention_mask=torch.ones(1, 1, 4, 4))
    for shape in ((2, 4), (1, 3)):
        with pytest.raises(ValueError, match=r"attention_mask: expected \[1, 4\] or longer"):
            layer(x, attention_mask=torch.ones(*shape))
    with pytest.raises(ValueError, match="cu_seqlens: expected neither"):
        layer(x, cu_seqlens=cu_seqlens, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=rf"hidden_states: expected \[B, T, {HIDDEN}\], got \(4, {HIDDEN}\)"):
        layer(x[0])
    layer.layer_idx = 1
    with pytest.raises(ValueError, match="past_key_values: expected a cache with a LayerState for layer 1"):
        layer(x, past_key_values=RecurrentCache(1))
    cache = RecurrentCache(2)
    layer(x, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="hidden_states: expected a batch of 1 as in the cache, got 2"):
        layer(x.repeat(2, 1, 1), past_key_values=cache, use_cache=True)


def test_chunks_with_a_backward_each_keep_a_state(seed):
    """Truncated backpropagation through time."""
    torch.manual_seed(seed)
    layer, x = GatedDeltaNet2(HIDDEN, head_dim=DIM, num_heads=HEADS, layer_idx=0), torch.randn(2, 30, HIDDEN)
    cache = RecurrentCache(1)
    parts = []
    for part in x.split(10, 1):
        o = layer(part, past_key_values=cache, use_cache=True)[0]
        o.square().sum().backward()
        parts.append(o.detach())
    torch.testing.assert_close(torch.cat(parts, 1), layer(x)[0].detach())


def test_parameters_start_where_the_paper_has_them():
    layer = GatedDeltaNet2(HIDDEN, head_dim=64, num_heads=64)
    A, dt = layer.A_log.detach().exp(), functional.softplus(layer.dt_bias.detach())
    assert A.min() >= 1 and A.max() <= 16 and A.mean() == pytest.approx(8.5, rel=0.3)
    assert dt.min() >= 0.999e-3 and dt.max() <= 0.1001
    assert dt.log().mean() == pytest.approx(math.log(1e-2), rel=0.05)
    exempt = {name for name, x in layer.named_parameters() if getattr(x, "_no_weight_decay", False)}
    assert exempt == {"A_log", "dt_bias", "g_proj.1.bias", "o_norm.weight"}


# -- convolution ---------------------------------------------------------------------------------------------


def test_causal_conv1d_gets_what_it_documents(monkeypatch, seed):
    """Channels-last x [B, D, T], weight [D, width], seq_idx or initial_states, and its own SiLU."""
    torch.manual_seed(seed)
    convolution = modules.ShortConvolution(8, 4, bias=True).requires_grad_(False)
    x, history = torch.randn(1, 50, 8), torch.randn(1, 3, 8)
    cu_seqlens = torch.tensor([0, 20, 50])

    def causal_conv1d_fn(x, weight, bias, seq_idx, initial_states, activation):
        assert activation == "silu" and x.stride(1) == 1 and weight.shape == (8, 4)
        if initial_states is not None:
            assert initial_states.shape == (1, 8, 3) and initial_states.stride(1) == 1
            x = torch.cat([initial_states, x], 2)
        parts = [x] if seq_idx is None else [x[..., (seq_idx[0] == n)] for n in seq_idx.unique()]
        ys = [functional.conv1d(functional.pad(y, (3, 0)), weight[:, None], bias, groups=8) for y in parts]
        return functional.silu(torch.cat(ys, 2)[..., -50:])

    fake = type("causal_conv1d", (), {"causal_conv1d_fn": staticmethod(causal_conv1d_fn)})
    monkeypatch.setitem(__import__("sys").modules, "causal_conv1d", fake)
    weight = convolution.weight.squeeze(1)
    for options in ((None, None), (history, None), (None, cu_seqlens)):
        y = modules._causal_conv1d(x, weight, convolution.bias, *options)
        compare.assert_close(y, convolution(x, *options), 1e-6, "y")


# -- flash-linear-attention's layer --------------------------------------------------------------------------


def fla_layer(**options):
    if importlib.util.find_spec("fla") is None:
        pytest.skip("flash-linear-attention is not installed")
    layers = pytest.importorskip("fla.layers")
    return layers.GatedDeltaNet2(HIDDEN, head_dim=64, num_heads=2, layer_idx=0, **options)


FLA_KINDS = {name: KINDS[name] for name in ("plain", "groups", "no_conv")}
FLA_KINDS |= {"conv_bias": {"conv_bias": True, "allow_neg_eigval": True}}


@pytest.mark.parametrize("options", FLA_KINDS.values(), ids=FLA_KINDS)
def test_checkpoints_of_fla_load(options):
    theirs = fla_layer(**options)
    ours = GatedDeltaNet2(HIDDEN, head_dim=64, num_heads=2, layer_idx=0, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("quick_triton")
@pytest.mark.parametrize("options", FLA_KINDS.values(), ids=FLA_KINDS)
def test_outputs_and_gradients_are_those_of_fla(hopper, options, seed):
    torch.manual_seed(seed)
    theirs = fla_layer(**options).to(hopper.device, hopper.dtype)
    ours = GatedDeltaNet2(HIDDEN, head_dim=64, num_heads=2, layer_idx=0, backend="cuda", **options)
    ours = ours.to(hopper.device, hopper.dtype)
    ours.load_state_dict(theirs.state_dict())
    names = [name for name, _ in ours.named_parameters()]
    # Over several batches: the gradient of A_log is a sum that may cancel in one of them.
    of_A_log: list[list] = [[], []]
    for n in range(0, 16, 2):
        x = make_x(hopper, seed + n, seqlen=300).requires_grad_()
        do = make_x(hopper, seed + n + 1, seqlen=300)
        outputs = [layer(x)[0] for layer in (ours, theirs)]
        compare.assert_close(outputs[0], outputs[1], 2e-2, "o")
        gradients = [
            torch.autograd.grad(o, [x, *map(layer.get_parameter, names)], do)
            for layer, o in zip((ours, theirs), outputs)
        ]
        for name, actual, expected in zip(["x", *names], *gradients):
            if name == "A_log":
                of_A_log[0].append(actual)
                of_A_log[1].append(expected)
            else:
                compare.assert_close(actual, expected, 3e-2, f"d{name}")
    compare.assert_close(*map(torch.stack, of_A_log), 3e-2, "dA_log")


@pytest.mark.gpu
@pytest.mark.usefixtures("quick_triton")
@pytest.mark.parametrize("options", FLA_KINDS.values(), ids=FLA_KINDS)
@torch.no_grad()
def test_generation_is_that_of_fla(hopper, options, seed):
    cache = pytest.importorskip("fla.models.utils").Cache()
    torch.manual_seed(seed)
    theirs = fla_layer(**options).to(hopper.device, hopper.dtype).eval()
    ours = GatedDeltaNet2(HIDDEN, head_dim=64, num_heads=2, layer_idx=0, backend="cuda", **options)
    ours = ours.to(hopper.device, hopper.dtype).eval()
    ours.load_state_dict(theirs.state_dict())
    x, states = make_x(hopper, seed, seqlen=140), RecurrentCache(1)
    for begin, end in ((0, 130), *((t, t + 1) for t in range(130, 140))):
        part = x[:, begin:end]
        o = ours(part, past_key_values=states, use_cache=True)[0]
        expected, _, cache = theirs(part, past_key_values=cache, use_cache=True)
        compare.assert_close(o, expected, 2e-2, f"o at {begin}")
