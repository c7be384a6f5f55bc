"""fp32 products by oneDNN: only where they are as exact, quicker, and nobody chose otherwise."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from isthmus import products
from isthmus.language.library import _attend
from isthmus.nn.attention import attend
from isthmus.products import multiply_quickly

CACHED = products.quicker
GPU, X86 = torch.cuda.is_available(), platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An x86 CPU without AMX and without a GPU, an empty cache; torch's own setting comes back."""
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_tile": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(products._STATE, "taken", False)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def costs(monkeypatch, **seconds):
    """What products take under each setting; a list of what was run."""
    monkeypatch.setattr(products, "_exact", lambda: True)
    ran, now = [], [0.0]

    def work(setting):
        def run():
            ran.append(setting)
            now[0] += seconds[setting]

        return run

    monkeypatch.setattr(products, "_work", work)
    monkeypatch.setattr(products, "quicker", lambda: CACHED.__wrapped__(lambda: now[0]))
    return ran


@pytest.mark.parametrize(("highest", "medium", "taken"), [(1.0, 0.45, True), (1.0, 0.85, False), (1.0, 1.4, False)])
def test_the_quicker_library_multiplies(monkeypatch, highest, medium, taken):
    costs(monkeypatch, highest=highest, medium=medium)
    assert multiply_quickly() is taken
    assert torch.get_float32_matmul_precision() == ("medium" if taken else "highest")


def test_it_is_timed_once_a_machine(monkeypatch):
    costs(monkeypatch, highest=1.0, medium=0.4)
    assert multiply_quickly()
    torch.set_float32_matmul_precision("highest")
    again = costs(monkeypatch, highest=0.1, medium=1.0)
    assert multiply_quickly()  # by what was kept
    assert not again


def test_products_in_bf16_are_not_taken_for_fp32(monkeypatch):
    assert products._exact()
    exact, real = products._exact, torch.Tensor.__matmul__

    def rounded(a, b):
        half = a.dtype == torch.float32
        return real(a.bfloat16(), b.bfloat16()).float() if half else real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not products._exact()
    ran = costs(monkeypatch, highest=1.0, medium=0.1)
    monkeypatch.setattr(products, "_exact", exact)
    assert not multiply_quickly()
    assert not ran
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    "why", ["amx", "aarch64", "gpu", "variable", "chosen", "elsewhere"], ids=lambda why: f"not with {why}"
)
def test_what_must_stay_as_it_is(monkeypatch, why):
    ran = costs(monkeypatch, highest=1.0, medium=0.1)
    if why == "amx":
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True})
    if why == "aarch64":
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
    if why == "gpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if why == "variable":
        monkeypatch.setenv(products.VARIABLE, "torch")
    if why == "chosen":
        torch.set_float32_matmul_precision("high")
    before = torch.get_float32_matmul_precision()
    assert not multiply_quickly(torch.device("cuda" if why == "elsewhere" else "cpu"))
    assert not ran
    assert torch.get_float32_matmul_precision() == before


class Attending(nn.Module):
    """What the library's attention asks of a layer."""

    is_causal = False


@pytest.mark.parametrize("attention", ["own", "library"])
def test_attention_multiplies_as_before_in_both_passes(monkeypatch, attention):
    costs(monkeypatch, highest=1.0, medium=0.1)
    seen = []
    real = torch.set_float32_matmul_precision
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda how: (seen.append(how), real(how)))
    x = torch.randn(2, 3, 5, 8, requires_grad=True)
    module = Attending()
    forward = {"own": lambda: attend(x, x, x, mask=None), "library": lambda: _attend(module, x, x, x, None)[0]}
    forward[attention]()  # torch's own setting stays
    assert not seen
    assert multiply_quickly()
    seen.clear()
    y = forward[attention]()
    assert seen == ["highest", "medium"]
    y.sum().backward()
    assert seen == ["highest", "medium"] * 2
    with torch.inference_mode():
        forward[attention]()
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.skipif(GPU or not X86, reason="a setting of x86 CPUs without a GPU beside them")
def test_a_process_that_loads_a_model_multiplies_so():
    code = (
        "import torch, isthmus; from isthmus import products; "
        "tried = products.quicker; products.quicker = lambda: True; "
        "isthmus.load('isthmus:lm', device='cpu'); "
        "print(torch.get_float32_matmul_precision(), products._exact() or not tried())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["medium", "True"]  # exact, or refused where nobody says that it is quicker
