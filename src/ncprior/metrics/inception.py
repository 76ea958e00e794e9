"""InceptionV3 as the Frechet inception distance has it, and where its weights are found."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.storage import replacing, restore

NAMES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAMES[0]}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIDE = 299  # pixels that the network reads
NUM_FEATURES = 2048

Step = str | tuple[str, str] | Callable[[Tensor], Tensor]


class _Convolution(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, each a chain of named convolutions and pools; a pair forks."""

    def __init__(self, convolutions: dict[str, nn.Module], *branches: list[Step]) -> None:
        super().__init__()
        for name, convolution in convolutions.items():
            self.add_module(name, convolution)
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._chain(x, branch) for branch in self.branches], 1)

    def _chain(self, x: Tensor, steps: list[Step]) -> Tensor:
        for step in steps:
            if isinstance(step, tuple):
                x = torch.cat([getattr(self, name)(x) for name in step], 1)
            else:
                x = getattr(self, step)(x) if isinstance(step, str) else step(x)
        return x


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


def _chain_of(stem: str, *sizes: tuple) -> tuple[dict[str, nn.Module], list[Step]]:
    """Convolutions stem_1, stem_2, ... and their names; a lone one is called as its stem."""
    names = [stem] if len(sizes) == 1 else [f"{stem}_{i + 1}" for i in range(len(sizes))]
    made = {name: _Convolution(*size) for name, size in zip(names, sizes, strict=True)}
    return dict(made), list(names)


def _block(*chains: tuple[dict[str, nn.Module], list[Step]], pool: list[Step]) -> _Mixed:
    convolutions: dict[str, nn.Module] = {}
    for made, _ in chains:
        convolutions |= made
    branches = [names for _, names in chains if names]
    return _Mixed(convolutions, *branches, pool)


def _a(n: int, pooled: int) -> _Mixed:
    return _block(
        _chain_of("branch1x1", (n, 64, 1)),
        _chain_of("branch5x5", (n, 48, 1), (48, 64, 5)),
        _chain_of("branch3x3dbl", (n, 64, 1), (64, 96, 3), (96, 96, 3)),
        ({"branch_pool": _Convolution(n, pooled, 1)}, []),
        pool=[_average, "branch_pool"],
    )


def _b(n: int) -> _Mixed:
    return _block(
        _chain_of("branch3x3", (n, 384, 3, 2)),
        _chain_of("branch3x3dbl", (n, 64, 1), (64, 96, 3), (96, 96, 3, 2)),
        pool=[_halve],
    )


def _c(n: int, c: int) -> _Mixed:
    wide, high = (1, 7), (7, 1)
    return _block(
        _chain_of("branch1x1", (n, 192, 1)),
        _chain_of("branch7x7", (n, c, 1), (c, c, wide), (c, 192, high)),
        _chain_of(
            "branch7x7dbl", (n, c, 1), (c, c, high), (c, c, wide), (c, c, high), (c, 192, wide)
        ),
        ({"branch_pool": _Convolution(n, 192, 1)}, []),
        pool=[_average, "branch_pool"],
    )


def _d(n: int) -> _Mixed:
    return _block(
        _chain_of("branch3x3", (n, 192, 1), (192, 320, 3, 2)),
        _chain_of(
            "branch7x7x3", (n, 192, 1), (192, 192, (1, 7)), (192, 192, (7, 1)), (192, 192, 3, 2)
        ),
        pool=[_halve],
    )


def _e(n: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    def fork(stem: str) -> dict[str, nn.Module]:
        return {
            f"{stem}a": _Convolution(384, 384, (1, 3)),
            f"{stem}b": _Convolution(384, 384, (3, 1)),
        }

    first = {"branch3x3_1": _Convolution(n, 384, 1)} | fork("branch3x3_2")
    second, names = _chain_of("branch3x3dbl", (n, 448, 1), (448, 384, 3))
    return _block(
        _chain_of("branch1x1", (n, 320, 1)),
        (first, ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]),
        (second | fork("branch3x3dbl_3"), [*names, ("branch3x3dbl_3a", "branch3x3dbl_3b")]),
        ({"branch_pool": _Convolution(n, 192, 1)}, []),
        pool=[pool, "branch_pool"],
    )


class Inception(nn.Module):
    """Images (n, 1 or 3, h, w) in [0, 1] to the 2048 averages before the classes.

    As in the TensorFlow program of 2015 from which the weights are: images are rounded to bytes,
    stretched to 299 by 299 by that program's bilinear rule (corners, not centres, coincide), and
    average pools leave their padding out, but for the last block, which takes the maximum.

    Reference: Szegedy et al. (CVPR 2016); Heusel et al. (NeurIPS 2017); the names of the weights
    are those of torchvision and pytorch-fid.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2a_3x3.conv.padding = (0, 0)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Conv2d_4a_3x3.conv.padding = (0, 0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c = _c(768, 128), _c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _c(768, 160), _c(768, 192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, _average), _e(2048, _maximum)
        self.fc = nn.Linear(NUM_FEATURES, 1008)  # in the file; not used

    def forward(self, images: Tensor) -> Tensor:
        x = (images * 255).round().expand(-1, 3, -1, -1)
        x = (stretched(x, SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))
        x = _halve(x)
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        return x.mean((2, 3))


def stretched(images: Tensor, side: int) -> Tensor:
    """Bilinear, output pixel i at input place i * size / side, as TensorFlow 1 did."""
    for dim in (2, 3):
        size = images.shape[dim]
        at = torch.arange(side, device=images.device, dtype=torch.float64) * size / side
        low = at.floor().long()
        high = (low + 1).clamp_max(size - 1)
        weight = (at - low).to(images.dtype).reshape([-1, 1] if dim == 2 else [-1])
        first, second = images.index_select(dim, low), images.index_select(dim, high)
        images = first + (second - first) * weight
    return images


def load_inception(path: str | os.PathLike[str] | None = None) -> Inception:
    """The network with its weights, in evaluation mode.

    Args:
        path: The file of the weights. Without it the folder where torch keeps those it downloads is
            looked into, and they are fetched where they are missing (95 MB).

    Raises:
        FileNotFoundError: no weights, and they could not be fetched; the message says where they
            are had, and what else there is.
        ValueError: a file of another content. Nothing is read from such a file.
    """
    found = Path(path) if path is not None else _cached() or _fetch()
    if not found.is_file():
        raise FileNotFoundError(f"{found} does not exist; {_ADVICE}")
    digest = _sha256(found)
    if digest != SHA256:
        raise ValueError(
            f"{found} is not the file of Inception weights that published distances are made with "
            f"(sha256 {digest[:16]}..., expected {SHA256[:16]}...); {_ADVICE}"
        )
    network = Inception()
    restore(network, torch.load(found, map_location="cpu", weights_only=True), found)
    return network.eval().requires_grad_(False)


_ADVICE = (
    f"get {URL} and pass its path as features, or take other features: mnist (shipped), pixels, "
    "pca-64, or those that ncprior features train makes of your data. Distances in those are "
    "not comparable with published FIDs"
)


def _folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _cached() -> Path | None:
    return next((_folder() / name for name in NAMES if (_folder() / name).is_file()), None)


def _fetch() -> Path:
    place = _folder() / NAMES[0]
    try:
        with (
            urllib.request.urlopen(URL, timeout=30) as stream,
            replacing(place) as temporary,
            temporary.open("wb") as file,
        ):
            while data := stream.read(1 << 20):
                file.write(data)
            file.flush()
            if _sha256(temporary) != SHA256:
                raise OSError("what came is damaged, or another file")
    except (OSError, urllib.error.URLError) as error:
        raise FileNotFoundError(
            f"the Inception weights are not in {place.parent} and could not be fetched "
            f"({getattr(error, 'reason', error)}); {_ADVICE}"
        ) from None
    return place


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
