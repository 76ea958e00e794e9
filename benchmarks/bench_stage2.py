"""A step of the ratio's fit on the MNIST recipe against the straightforward one.

NCPRIOR_DATA=... python benchmarks/bench_stage2.py     (random images without the variable)
"""

from typing import Any

import torch
import torch.nn.functional as F
from bench_stage1 import mnist
from common import interleaved, show
from torch import nn

from ncprior.numerics import stream
from ncprior.training.evidence import EvidenceTable, encode
from ncprior.training.loop import Place, make_fabric, optimise
from ncprior.training.presets import PRESETS
from ncprior.training.ratios import _heldout_pairs, _new_ratios, _RatioJob
from ncprior.vaes import build_vae

BATCH, STEPS = 512, 100


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout),
            nn.Linear(width, width),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def plain_network(preset: str) -> nn.Module:
    if preset == "published":
        return nn.Sequential(
            nn.Linear(50, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1)
        )
    options = PRESETS[preset]["network_options"]
    return Members(nn.ModuleList(one_member(options) for _ in range(options["members"])))


def one_member(options: dict[str, Any]) -> nn.Module:
    width, dropout = options["width"], options["dropout"]
    blocks = [Block(width, dropout) for _ in range(options["blocks"])]
    return nn.Sequential(
        nn.Linear(50, width), *blocks, nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, 1)
    )


class Members(nn.Module):
    """Members one after the other, each on rows of its own."""

    def __init__(self, members: nn.ModuleList) -> None:
        super().__init__()
        self.members = members

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        parts = z.tensor_split(len(self.members))
        return torch.cat([m(part) for m, part in zip(self.members, parts, strict=True)])


class Plain:
    """The step as one would write it: draw the pixels, run the encoder, classify, AdamW."""

    def __init__(self, images: torch.Tensor, vae: nn.Module, preset: str) -> None:
        self.images, self.vae = images.float() / 255, vae
        self.rows = BATCH * PRESETS[preset]["network_options"]["members"]
        self.network = plain_network(preset)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def step(self) -> None:
        x = torch.bernoulli(self.images[torch.randint(len(self.images), (self.rows,))])
        with torch.no_grad():
            loc, scale = self.vae.encode(x)
            z_q = torch.distributions.Normal(loc, scale).sample()
            z_p = torch.distributions.Normal(torch.zeros_like(loc), torch.ones_like(loc)).sample()
        logits = self.network(torch.cat([z_q, z_p])).squeeze(1)
        target = torch.cat([torch.ones(self.rows), torch.zeros(self.rows)])
        loss = 2 * F.binary_cross_entropy_with_logits(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


def main() -> None:
    torch.manual_seed(0)
    data = mnist()
    assert isinstance(data.images, torch.Tensor)
    vae = build_vae(data.image_shape, preset="lars-mnist").eval()
    rows = torch.arange(min(48_000, len(data)))
    fabric = make_fabric("cpu")
    held = encode(vae, data, rows[:500], generator=stream(0, "held"))
    pairs, _ = _heldout_pairs(vae, held, stream(0, "pairs"))
    for preset in ("large", "published"):
        plain = Plain(data.images, vae, preset)
        slices = 4 * len(rows) // plain.rows  # an image anew in four passes, as `fit` does
        table = EvidenceTable(vae, data, rows, slices=slices)

        def ours(preset: str = preset, table: EvidenceTable = table) -> None:
            job = _RatioJob(
                _new_ratios(PRESETS[preset], pairs, 0), vae, table, pairs[:1],
                batch_size=BATCH, patience=99, seed=0,
            )  # fmt: skip
            table.step = -1  # as a long run would find it, not rebuilt for these few steps
            # Neither side evaluates held-out draws: only steps are compared.
            job.evaluate = lambda step: {}  # type: ignore[method-assign]
            optimise(
                job, fabric, place=Place(), steps=STEPS, learning_rate=1e-3,
                evaluate_every=STEPS, progress=False,
            )  # fmt: skip

        seconds = interleaved({"plain": lambda: [plain.step() for _ in range(STEPS)], "ours": ours})
        show(
            f"Stage 2, MNIST recipe, preset {preset}, batch {BATCH}",
            [
                ("straightforward step", f"{1e3 * seconds['plain'] / STEPS:.2f} ms"),
                ("our step", f"{1e3 * seconds['ours'] / STEPS:.2f} ms"),
                ("straightforward / ours", f"{seconds['plain'] / seconds['ours']:.2f}"),
            ],
        )


if __name__ == "__main__":
    main()
