import pytest
import torch
import torch.nn.functional as F

from ncprior import products
from ncprior.products import COLUMNS, ROWS, Linear, affine


@pytest.fixture
def convolved(monkeypatch):
    """Calls of the convolution, on any processor as if it were the faster one."""
    calls, conv2d = [], F.conv2d

    def counted(*args):
        calls.append(args)
        return conv2d(*args)

    monkeypatch.setattr(products, "convolves", lambda: True)
    monkeypatch.setattr(F, "conv2d", counted)
    return calls


def numbers(rng, rows, before=7, after=COLUMNS, dtype=torch.float32):
    shapes = (rows, before), (before, after), (after,)
    return [torch.randn(shape, generator=rng, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("rows", [ROWS, 34 * 20, 1000, 1024])
def test_convolution_is_the_product(convolved, rng, rows):
    x, weight, bias = numbers(rng, rows)
    found = affine(x, weight, bias)
    assert len(convolved) == 1
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.addmm(bias, x, weight))


def test_gradients_are_those_of_the_product(convolved, rng):
    given = [each.requires_grad_() for each in numbers(rng, ROWS)]
    weights = torch.randn(ROWS, COLUMNS, generator=rng)
    own = torch.autograd.grad((affine(*given) * weights).sum(), given)
    x, weight, bias = given
    expected = torch.autograd.grad((torch.addmm(bias, x, weight) * weights).sum(), given)
    assert convolved
    for mine, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_layer_is_a_linear_layer(convolved, rng):
    layer = Linear(7, 20)
    x = torch.randn(ROWS, 7, generator=rng)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert convolved


@pytest.mark.parametrize(
    "change",
    [
        {"rows": ROWS - 1},
        {"rows": 521},  # a prime: cannot be cut into parts
        {"after": COLUMNS - 1},
        {"dtype": torch.float64},
    ],
)
def test_other_products_are_plain(convolved, rng, change):
    x, weight, bias = numbers(rng, **{"rows": ROWS} | change)
    out = torch.empty(len(x), len(bias), dtype=x.dtype)
    assert affine(x, weight, bias, out) is out
    assert not convolved
    assert torch.equal(out, torch.addmm(bias, x, weight))


def test_rows_that_lie_apart_are_multiplied_plainly(convolved, rng):
    _, weight, bias = numbers(rng, ROWS)
    x = torch.randn(7, ROWS, generator=rng).T
    torch.testing.assert_close(affine(x, weight, bias), x @ weight + bias)
    assert not convolved


@pytest.mark.parametrize(
    ("capability", "maker", "expected"),
    [
        ("AVX512", "vendor_id\t: AuthenticAMD", True),
        ("AVX512", "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", True),
        ("AVX512", "vendor_id\t: GenuineIntel", False),
        ("AVX512", "Intel64 Family 6 Model 143, GenuineIntel", False),
        ("AVX2", "vendor_id\t: AuthenticAMD", False),
        ("DEFAULT", "", False),
    ],
)
def test_which_processors_convolve(monkeypatch, capability, maker, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(products, "_maker", lambda: maker)
    assert products.convolves.__wrapped__() is expected
