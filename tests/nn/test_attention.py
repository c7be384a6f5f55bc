"""Attention: equal to PyTorch's own, masks, cross-attention."""

import pytest
import torch

from isthmus import measured
from isthmus.errors import ConfigError
from isthmus.nn import attention
from isthmus.nn.attention import Attention, attend, cast_once
from tests.narrow import there


def _copy(ours: Attention, theirs: torch.nn.MultiheadAttention) -> None:
    with torch.no_grad():
        weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
        for layer, weight, bias in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights, biases, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())


@pytest.fixture
def pair():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = Attention(16, 4).double()
    _copy(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("causal", [False, True])
def test_self_attention_equals_pytorch(pair, causal):
    ours, theirs = pair
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
    torch.testing.assert_close(ours(x, causal=causal), expected, atol=1e-12, rtol=0)


def test_cross_attention_and_mask_equal_pytorch(pair):
    ours, theirs = pair
    x, context = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64)
    seen = torch.rand(2, 7) > 0.4
    seen[:, 0] = True
    expected, _ = theirs(x, context, context, key_padding_mask=~seen, need_weights=False)
    torch.testing.assert_close(ours(x, context, mask=seen[:, None, None]), expected, atol=1e-12, rtol=0)


def test_mask_and_causal_together(pair):
    ours, _ = pair
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    seen = torch.ones(1, 1, 1, 6, dtype=torch.bool)
    torch.testing.assert_close(ours(x, mask=seen, causal=True), ours(x, causal=True), atol=1e-12, rtol=0)


def test_a_query_that_may_look_nowhere_gets_the_output_bias(pair):
    ours, _ = pair
    x = torch.randn(1, 2, 16, dtype=torch.float64)
    y = ours(x, mask=torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    torch.testing.assert_close(y, ours.out_proj.bias.expand_as(y))


def test_other_widths():
    attention = Attention(12, 2, context_width=20, head_width=8, bias=False)
    assert attention(torch.randn(1, 3, 12), torch.randn(1, 4, 20)).shape == (1, 3, 12)
    assert all(p.ndim == 2 for p in attention.parameters())


def test_errors():
    with pytest.raises(ConfigError, match="cannot be shared among 3 heads"):
        Attention(16, 3)
    with pytest.raises(ConfigError, match="one sequence"):
        Attention(8, 2)(torch.randn(1, 2, 8), torch.randn(1, 2, 8), causal=True)


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_half_precision_is_computed_in_float32_under_autocast_too(causal, masked):
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, 5, 8).bfloat16().float().requires_grad_() for _ in range(3)]
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    mask = None
    if masked:
        mask = torch.rand(2, 1, 5, 5) > 0.4
        mask[0, 0, 2] = False
    expected = attend(*exact, mask=mask, causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*half, mask=mask, causal=causal)
    assert torch.equal(found, expected.bfloat16())
    expected.sum().backward()
    found.sum().backward()
    for mine, other in zip(half, exact, strict=True):
        torch.testing.assert_close(there(mine.grad).float(), other.grad, atol=0.02, rtol=0.01)


@pytest.mark.parametrize("half", [True, False], ids=["half queries", "full queries"])
def test_under_autocast_on_a_cpu_attention_is_computed_in_float32(monkeypatch, half):
    """Backwards the half-precision kernel took four times as long, where queries were full and keys half."""
    seen, kernel = set(), torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **named):
        seen.update((x.dtype, torch.is_autocast_enabled("cpu")) for x in (q, k, v))
        return kernel(q, k, v, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attend(q.bfloat16() if half else q, k.bfloat16(), v.bfloat16(), mask=None)
    assert seen == {(torch.float32, False)}
    assert y.dtype == (torch.bfloat16 if half else torch.float32)


@pytest.mark.parametrize("quicker", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_a_cast_model_that_only_answers_attends_in_the_quicker_precision(monkeypatch, quicker, gradient):
    """Writing in bf16 took longer than transformers' loop: every step cast all the keys and values read before."""
    seen, asked, kernel = set(), [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **named):
        seen.update(x.dtype for x in (q, k, v))
        return kernel(q, k, v, **named)

    def told(dtype, *, single):
        asked.append((dtype, single))
        return quicker

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(attention, "half_is_quicker", told)
    q, k, v = (torch.randn(1, 2, n, 4).bfloat16().requires_grad_(gradient) for n in (1, 3, 3))
    assert attend(q, k, v, mask=None).dtype == torch.bfloat16
    assert seen == {torch.bfloat16 if quicker and not gradient else torch.float32}
    assert asked == ([] if gradient else [(torch.bfloat16, True)])
    with torch.no_grad():
        attend(k, k, v, mask=None)
    assert asked[-1] == (torch.bfloat16, False)
    asked.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        attend(q, k, v, mask=None)  # a pass with a gradient may follow, and must find the same
    assert not asked
    seen.clear()
    for half in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), attention.frozen():
            y = attend(q if half else q.float(), k, v, mask=None)
        assert y.dtype == (torch.bfloat16 if half else torch.float32)
    assert asked == [(torch.bfloat16, True)] * 2
    assert seen == {torch.bfloat16 if quicker else torch.float32}
    assert torch.is_grad_enabled()


def test_which_precision_attends_quicker_is_timed_once_a_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    took = iter([3.0, 1.0])

    def timed(runs, timer):
        for run in runs.values():
            run()
        return {name: next(took) for name in runs}

    monkeypatch.setattr(measured, "measure", timed)
    attention.half_is_quicker.cache_clear()
    assert not attention.half_is_quicker(torch.bfloat16, single=True)
    monkeypatch.setattr(measured, "measure", None)  # kept in the cache folder
    attention.half_is_quicker.cache_clear()
    assert not attention.half_is_quicker(torch.bfloat16, single=True)
    took = iter([1.0, 3.0])
    monkeypatch.setattr(measured, "measure", timed)
    assert attention.half_is_quicker(torch.bfloat16, single=False)
    attention.half_is_quicker.cache_clear()


def test_each_precision_is_timed_under_autocast_too(monkeypatch, tmp_path):
    """Of a frozen encoder the answer is first asked for under autocast, and kept for the machine."""
    ran, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors, **named):
        y = kernel(*tensors, **named)
        ran.append(y.dtype)
        return y

    def timed(runs, timer):
        for run in runs.values():
            run()
        return {"half": 1.0, "full": 2.0}

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    monkeypatch.setattr(measured, "measure", timed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention.half_is_quicker.cache_clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention.half_is_quicker(torch.bfloat16, single=False)
    attention.half_is_quicker.cache_clear()
    assert ran == [torch.bfloat16, torch.float32]


def test_what_several_projections_read_is_cast_once():
    x = torch.randn(2, 3)
    assert cast_once(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cast_once(x).dtype == torch.bfloat16
        assert cast_once(x.double()).dtype == torch.float64  # autocast leaves those, too
        assert cast_once(x.to("meta")).dtype == torch.float32


def test_shapes_are_told_on_the_meta_device():
    with torch.device("meta"):
        assert Attention(16, 4)(torch.empty(2, 5, 16)).shape == (2, 5, 16)
