"""SIR draws per second: streamed against all proposals at once, as shares of the matrix product.

python benchmarks/bench_sir.py
"""

from unittest.mock import patch

import torch
from common import as_after_reading, flops, interleaved, products, show

from ncprior import products as ours
from ncprior.normal import StandardNormal
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import MLPRatio, ResidualRatio
from ncprior.samplers import sir
from ncprior.walk import Group

LATENTS, PROPOSALS, DRAWS, CHUNK = 16, 1000, 256, 4096


@torch.no_grad()
def straightforward(ratio: torch.nn.Module, batch: int = 64) -> torch.Tensor:
    """All proposals of a batch of draws in memory, weighed at once, picked by multinomial."""
    picks = []
    for first in range(0, DRAWS, batch):
        n = min(batch, DRAWS - first)
        z = torch.randn(n * PROPOSALS, LATENTS)
        weights = ratio(z).view(n, PROPOSALS).softmax(1)
        pick = torch.multinomial(weights, 1).squeeze(1)
        picks.append(z.view(n, PROPOSALS, LATENTS)[torch.arange(n), pick])
    return torch.cat(picks)


def streamed(prior: NoiseContrastivePrior, chunk: int) -> torch.Tensor:
    base = StandardNormal(LATENTS)
    group = Group(base.rows(DRAWS), None, None)
    return sir(
        lambda i, k, generator: base.sample((k,), generator=generator),
        prior.weigher(0, group),
        DRAWS,
        PROPOSALS,
        generator=[stream(0, "draw", i) for i in range(DRAWS)],
        chunk=chunk,
    ).samples


@torch.no_grad()
def law(prior: NoiseContrastivePrior, lower: NoiseContrastivePrior) -> str:
    """How far the picks' probabilities move when log r spreads by 2 nats, as real ones do."""
    z = torch.randn(64, PROPOSALS, LATENTS)
    group = Group(StandardNormal(LATENTS).rows(64), None, None)
    log_r, rough = (p.weigher(0, group)(z, slice(0, 64)) for p in (prior, lower))
    scale = 2 / log_r.std()
    moved = ((scale * log_r).softmax(1) - (scale * rough).softmax(1)).abs().sum(1) / 2
    error = scale * (rough - log_r).std()
    return f"log r off by {error:.3f} nats (sd), picks by {moved.mean():.3f} in total variation"


def main() -> None:
    as_after_reading()
    torch.manual_seed(0)
    networks = {
        "16-128-128-1 ReLU": (
            MLPRatio(LATENTS, hidden=(128, 128), activation="relu"),
            [(LATENTS, 128), (128, 128), (128, 1)],
        ),
        "8 members x 64, 2 residual blocks": (
            ResidualRatio(LATENTS),
            [(LATENTS, 512)] + [(64, 64)] * 32 + [(512, 1)],
        ),
    }
    for name, (ratio, layers) in networks.items():
        ratio.eval()
        prior = NoiseContrastivePrior([ratio], StandardNormal(LATENTS))
        repeats = DRAWS * PROPOSALS // CHUNK
        shapes = [(CHUNK, i, o) for i, o in layers]
        product = products(shapes)
        functions = {
            "product": lambda: [product() for _ in range(repeats)],
            "streamed": lambda: streamed(prior, prior.chunk(0)),
            "straightforward": lambda: straightforward(ratio),
        }

        def plainly() -> None:
            with patch.object(ours, "convolves", lambda: False):
                streamed(prior, prior.chunk(0))

        functions["plain products"] = plainly
        lower = prior.in_bfloat16()
        functions["bfloat16"] = lambda: streamed(lower, prior.chunk(0))
        seconds = interleaved(functions, repeats=7)
        scale = DRAWS * PROPOSALS / (repeats * CHUNK)
        floor = seconds["product"] * scale
        rate = flops(shapes) * repeats / seconds["product"] / 1e9
        show(
            f"SIR, {PROPOSALS} proposals, {name}",
            [
                ("matrix product alone", f"{rate:.0f} GFLOP/s"),
                (
                    "straightforward",
                    f"{floor / seconds['straightforward']:.0%} of the product's rate",
                ),
                ("streamed", f"{floor / seconds['streamed']:.0%} of the product's rate"),
                (
                    "streamed / straightforward",
                    f"{seconds['straightforward'] / seconds['streamed']:.2f} times as fast",
                ),
                (
                    "the same with plain products / streamed",
                    f"{seconds['plain products'] / seconds['streamed']:.2f} times as fast",
                ),
                ("streamed", f"{DRAWS / seconds['streamed']:.0f} draws/s"),
                (
                    "bfloat16 / float32",
                    f"{seconds['streamed'] / seconds['bfloat16']:.2f} times as fast",
                ),
                ("bfloat16, what it does to the law", law(prior, lower)),
            ],
        )


if __name__ == "__main__":
    main()
