"""What Gated Delta Rule-2 becomes in special cases, and what must not change when something else does.

Each simpler rule is written here on its own, in float64, as its paper states it: matrices, head by head.
"""

import cases
import compare
import numpy as np
import pytest
import torch

SHAPE = {"batch": 2, "seqlen": 100, "heads": 2, "dim_k": 32, "dim_v": 48}


def run_rule(inputs: cases.Inputs, initial_state: torch.Tensor, step) -> dict[str, np.ndarray]:
    """o and the final state of S_t = step(S_{t-1}, k, v, alpha, beta), o_t = scale S_t^T q_t, head by head.

    beta is the first channel of the write gate: the rules have one gate, a number per token.
    """
    q, k, v, g, _, w = (compare.to_float64(x) for x in inputs.tensors)
    states = compare.to_float64(initial_state).copy()
    o = np.zeros(v.shape)
    for n, head in np.ndindex(states.shape[:2]):
        S = states[n, head]
        for t in range(q.shape[1]):
            here = n, t, head
            S = step(S, k[here], v[here], np.exp(g[here]), w[here][0])
            o[here] = q.shape[3] ** -0.5 * (S.T @ q[here])
        states[n, head] = S
    return {"o": o, "S": states}


def kimi_delta_attention(S, k, v, alpha, beta):
    return (np.eye(len(k)) - beta * np.outer(k, k)) @ np.diag(alpha) @ S + beta * np.outer(k, v)


def gated_delta_net(S, k, v, alpha, beta):
    return alpha[0] * (np.eye(len(k)) - beta * np.outer(k, k)) @ S + beta * np.outer(k, v)


def delta_net(S, k, v, alpha, beta):
    return S - beta * np.outer(k, k @ S - v)


def gated_linear_attention(S, k, v, alpha, beta):
    return alpha[:, None] * S + np.outer(k, v)


def state_space_duality(S, k, v, alpha, beta):
    return alpha[0] * S + np.outer(k, v)


@pytest.mark.every_dtype
@pytest.mark.parametrize(
    "rule, gates, decay",
    [
        (kimi_delta_attention, "b = w = beta", "per channel"),
        (gated_delta_net, "b = w = beta", "one per token"),
        (delta_net, "b = w = beta", "none"),
        (gated_linear_attention, "b = 0, w = 1", "per channel"),
        (state_space_duality, "b = 0, w = 1", "one per token"),
    ],
    ids=lambda x: x.__name__ if callable(x) else None,
)
def test_simpler_rules_are_special_cases(backend, rule, gates, decay, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    if gates == "b = w = beta":
        beta = inputs.w[..., :1].clone()
        inputs.b, inputs.w = beta.expand(inputs.b.shape).clone(), beta.expand(inputs.w.shape).clone()
    else:
        inputs.b, inputs.w = torch.zeros_like(inputs.b), torch.ones_like(inputs.w)
    if decay == "one per token":
        inputs.g = inputs.g[..., :1].expand(inputs.g.shape).clone()
    elif decay == "none":
        inputs.g = torch.zeros_like(inputs.g)
    initial_state, _ = backend.states(inputs, seed=seed)
    o, final_state = backend.forward(inputs, initial_state=initial_state, output_final_state=True)
    backend.check({"o": o, "S": final_state}, run_rule(inputs, initial_state, rule))


def test_no_write_and_no_erase_leave_a_decaying_state(backend, seed):
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    inputs.b.zero_()
    inputs.w.zero_()
    initial_state, _ = backend.states(inputs, seed=seed)
    _, final_state = backend.forward(inputs, initial_state=initial_state, output_final_state=True)
    decay = compare.to_float64(inputs.g).sum(1)  # [B, H, K]
    expected = np.exp(decay)[..., None] * compare.to_float64(initial_state)
    compare.assert_close(final_state, expected, backend.bar("S"), "S")


def test_a_full_overwrite_returns_the_value_at_its_key(backend, seed):
    """b = w = 1, no decay, a unit key asked for right after: o is the value itself."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    inputs.g.zero_()
    inputs.b.fill_(1)
    inputs.w.fill_(1)
    inputs.q.copy_(inputs.k)
    o, _ = backend.forward(inputs, scale=1.0)
    norm = compare.to_float64(inputs.k).__pow__(2).sum(-1, keepdims=True)  # 1 but for the rounding to 16 bits
    tolerance = backend.bar("o") + np.abs(norm - 1).max()
    compare.assert_close(o, inputs.v, tolerance, "o")


# -- one run or several --------------------------------------------------------------------------------------


def slices(inputs: cases.Inputs, begin: int | None, end: int | None) -> cases.Inputs:
    return cases.Inputs(*(x[:, begin:end] for x in inputs.tensors), do=inputs.do[:, begin:end])


def test_a_run_equals_two_runs_that_hand_over_the_state_at_any_token(backend, seed):
    inputs = backend.inputs("slow", batch=1, seqlen=131, heads=2, dim_k=16, dim_v=16, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    expected = backend.expected(inputs, initial_state=initial_state)
    for t in range(inputs.q.shape[1] + 1):
        first, state = backend.forward(
            slices(inputs, None, t), initial_state=initial_state, output_final_state=True
        )
        second, final_state = backend.forward(
            slices(inputs, t, None), initial_state=state, output_final_state=True
        )
        results = {"o": torch.cat([first, second], dim=1), "S": final_state}
        backend.check(results, expected, where=f" handed over at {t}")


@pytest.mark.parametrize("t", [0, 1, 16, 63, 64, 65, 99, 100])
def test_gradients_pass_through_a_state_that_is_handed_over(backend, t, seed):
    """dS of the second run is dS' of the first."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    initial_state, d_final_state = backend.states(inputs, seed=seed)
    expected = backend.expected(inputs, initial_state=initial_state, d_final_state=d_final_state)
    _, state = backend.forward(slices(inputs, None, t), initial_state=initial_state, output_final_state=True)
    second = backend.run(slices(inputs, t, None), initial_state=state, d_final_state=d_final_state)
    first = backend.run(
        slices(inputs, None, t), initial_state=initial_state, d_final_state=second["d_initial_state"]
    )
    results = {
        name: torch.cat([first[name], second[name]], dim=1)
        for name in ("o", "dq", "dk", "dv", "dg", "db", "dw")
    }
    results |= {"S": second["S"], "d_initial_state": first["d_initial_state"]}
    backend.check(results, expected)


@pytest.mark.every_dtype
@pytest.mark.parametrize("regime", cases.REGIMES)
def test_the_chunk_form_equals_the_token_form(backend, regime, seed):
    from gdn2_ext import fused_recurrent_gdn2

    inputs = backend.inputs(regime, **SHAPE, seed=seed)
    initial_state, _ = backend.states(inputs, seed=seed)
    options = {"initial_state": initial_state, "output_final_state": True}
    o, S = backend.forward(inputs, **options)
    token_o, token_S = fused_recurrent_gdn2(*inputs.tensors, **options, backend="torch")
    # Both are within the bar of the exact result.
    compare.assert_close(o, token_o, 2 * backend.bar("o", regime), "o")
    compare.assert_close(S, token_S, 2 * backend.bar("S", regime), "S")


# -- causality -----------------------------------------------------------------------------------------------

CUTS = (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129)


@pytest.mark.every_dtype
@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("regime", ["slow", "uniform5", "resets"])
def test_no_output_changes_in_any_bit_when_later_tokens_do(backend, regime, dim, seed):
    inputs = backend.inputs(regime, seqlen=130, heads=2, dim_k=dim, dim_v=dim, seed=seed)
    o, _ = backend.forward(inputs)
    for t in CUTS:
        changed, _ = backend.forward(cases.with_another_future(inputs, t, seed + 1))
        assert torch.isfinite(changed).all()
        assert not torch.equal(changed[:, t:], o[:, t:])
        compare.assert_bitwise_equal(changed[:, :t], o[:, :t], f"o before token {t}")


def test_no_state_changes_in_any_bit_when_later_tokens_do(backend, seed):
    """The states at the starts of the chunks up to the changed one."""
    inputs = backend.inputs("slow", seqlen=200, heads=2, dim_k=32, dim_v=32, seed=seed)
    _, _, h = backend.forward(inputs, return_intermediate_states=True)
    for t in (1, 63, 64, 65, 128, 199):
        other = cases.with_another_future(inputs, t, seed + 1)
        _, _, changed = backend.forward(other, return_intermediate_states=True)
        untouched = t // 64 + 1
        compare.assert_bitwise_equal(changed[:, :untouched], h[:, :untouched], f"h up to token {t}")


@pytest.mark.every_dtype
@pytest.mark.parametrize("dim", [32, 128])
def test_tokens_after_the_last_that_is_asked_about_have_zero_gradients(backend, dim, seed):
    """Causality seen from behind: with no gradient at t and after, nothing there has one, to the bit."""
    inputs = backend.inputs("slow", seqlen=130, heads=2, dim_k=dim, dim_v=dim, seed=seed)
    for t in (0, 1, 17, 63, 64, 65, 100, 129):
        do = inputs.do.clone()
        do[:, t:] = 0
        results = backend.run(inputs, do=do)
        for name in ("dq", "dk", "dv", "dg", "db", "dw"):
            assert not results[name][:, t:].any(), f"{name} is not zero somewhere from token {t} on"


def test_an_output_gradient_reaches_only_tokens_up_to_it(backend, seed):
    """The gradient of o at one token, against the reference."""
    inputs = backend.inputs("slow", seqlen=130, heads=1, dim_k=32, dim_v=32, seed=seed)
    for t in (0, 64, 129):
        do = torch.zeros_like(inputs.do)
        do[:, t] = inputs.do[:, t]
        inputs_t = cases.Inputs(*inputs.tensors, do=do)
        backend.check(backend.run(inputs_t), backend.expected(inputs_t), where=f" from token {t}")


# -- linearity -----------------------------------------------------------------------------------------------


@pytest.mark.most_exact_dtype
def test_the_output_is_linear_in_the_values_and_the_state_together(backend, seed):
    x, y = (backend.inputs("slow", **SHAPE, seed=seed + i) for i in range(2))
    (state_x, state_y), total = backend.states(x, seed=seed), cases.Inputs(*x.tensors, do=x.do)
    y_values = cases.Inputs(x.q, x.k, y.v, x.g, x.b, x.w, do=x.do)
    total.v = 2 * x.v - 3 * y.v
    o_x, S_x = backend.forward(x, initial_state=state_x, output_final_state=True)
    o_y, S_y = backend.forward(y_values, initial_state=state_y, output_final_state=True)
    o, S = backend.forward(total, initial_state=2 * state_x - 3 * state_y, output_final_state=True)
    bars = {
        name: 10 * backend.bar(name) for name in ("o", "S")
    }  # three roundings, the terms larger than the sum
    compare.assert_close(o, 2 * o_x.double() - 3 * o_y.double(), bars["o"], "o")
    compare.assert_close(S, 2 * S_x.double() - 3 * S_y.double(), bars["S"], "S")


def test_v_columns_do_not_see_each_other(backend, seed):
    """Every column of v is a run of its own: other numbers in one change no bit of the others."""
    inputs = backend.inputs("slow", **SHAPE, seed=seed)
    o, S = backend.forward(inputs, output_final_state=True)
    inputs.v[..., 5] = 1e4
    changed_o, changed_S = backend.forward(inputs, output_final_state=True)
    others = [column for column in range(SHAPE["dim_v"]) if column != 5]
    compare.assert_bitwise_equal(changed_o[..., others], o[..., others], "o of the other columns")
    compare.assert_bitwise_equal(changed_S[..., others], S[..., others], "S of the other columns")
