"""Products of matrices at the rate of the processor.

Torch multiplies matrices by MKL, which stops at AVX2 on processors that are not Intel's, and
convolves by oneDNN, which takes AVX-512 where it is there. So on AMD's processors with AVX-512 a
product of many rows is twice as fast as a convolution of 1x1.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS, COLUMNS = 512, 16
"""Smaller products are left to MKL: it takes many rows until a convolution is faster."""
PARTS = range(16, 33)
"""Images that the rows are cut into; torch convolves fewer by other means on one thread."""


def affine(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """x (n, i) times weight (i, o) plus bias (o,), to (n, o): `torch.addmm`, if need be faster.

    Memory for the result, `out`, is used by the plain product only.
    """
    parts = _parts(x, weight)
    if parts is None:
        return torch.addmm(bias, x, weight, out=out)
    maps = x.view(parts, 1, -1, x.shape[1]).permute(0, 3, 1, 2)  # rows along a side, no copy
    product = F.conv2d(maps, weight.T[:, :, None, None], bias)
    return product.permute(0, 2, 3, 1).reshape(len(x), -1)


class Linear(nn.Linear):
    """`nn.Linear` with a bias, of (n, i) by `affine`."""

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight.T, self.bias)


def _parts(x: Tensor, weight: Tensor) -> int | None:
    """How many images the rows make; None where the plain product is to be used."""
    if len(x) < ROWS or weight.shape[1] < COLUMNS or not x.is_contiguous():
        return None
    if not (x.is_cpu and x.dtype == torch.float32 and convolves()):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    return next((parts for parts in PARTS if len(x) % parts == 0), None)


@cache
def convolves() -> bool:
    """Whether convolutions multiply faster than products of matrices on this processor."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return wide and libraries and "AMD" in _maker()


def _maker() -> str:
    """What the system says of the processor's maker, such as "AuthenticAMD"."""
    listed = Path("/proc/cpuinfo")
    if not listed.exists():
        return platform.processor()
    lines = listed.read_text().splitlines()
    return next((line for line in lines if line.startswith("vendor_id")), "")
