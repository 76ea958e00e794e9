"""NLL from 1000 importance samples against usual loops over images, MNIST's MLP on one core.

python benchmarks/bench_likelihood.py [images]

All loops send copies of one image through encoder and decoder: 100 at a time, as in `get_nll` of
pythae's VAE (version 0.1.2, rewritten here: cross-entropy of probabilities, and a graph that is
never used, since the method does not switch it off); 100 at a time through clamped probabilities
and their logarithms, as in the code of VampPrior; or all 1000 at once with the cross-entropy of
logits, the best that a loop can do. A loop takes the same time for every image, so that a few
images say what 1000 take; 50 by default. Times are the processor's.
"""

import math
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import as_after_reading, flops, interleaved, products, show

from ncprior.metrics import importance_weighted_bounds
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import MLPRatio
from ncprior.vaes import build_vae

SAMPLES = 1000
LAYERS = [(50, 300), (300, 300), (300, 784)]  # of the decoder


def cross_entropy(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def clamped_logarithms(logits: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    probability = logits.sigmoid().clamp(1e-5, 1 - 1e-5)
    log_x = x * probability.log() + (1 - x) * (1 - probability).log()
    return -log_x.flatten(1).sum(1)


def as_pythae(vae: torch.nn.Module, images: torch.Tensor, batch: int = 100) -> torch.Tensor:
    """The steps of its `get_nll` for one image after the other."""
    found = []
    for image in images:
        log_p = []
        for _ in range(SAMPLES // batch):
            x = torch.cat(batch * [image[None]])
            loc, scale = vae.encode(x)
            log_var = 2 * scale.log()  # which its encoders give
            std = torch.exp(0.5 * log_var)
            z = loc + torch.randn_like(std) * std
            log_q = -0.5 * (log_var + (z - loc) ** 2 / torch.exp(log_var)).sum(-1)
            log_prior = -0.5 * (z**2).sum(-1)
            reconstruction = vae.decoder(z).sigmoid()
            log_x = -F.binary_cross_entropy(
                reconstruction.reshape(batch, -1), x.reshape(batch, -1), reduction="none"
            ).sum(-1)
            log_p.append(log_x + log_prior - log_q)
        found.append((torch.cat(log_p).logsumexp(0) - math.log(SAMPLES)).item())
    return torch.tensor(found)


@torch.no_grad()
def per_image(
    vae: torch.nn.Module,
    images: torch.Tensor,
    copies: int,
    nll: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The loop, `copies` of an image at a time, with log-densities by torch.distributions."""
    generator, found = stream(0, "loop"), []
    for image in images:
        x, log_w = image.expand(copies, -1, -1, -1), []
        for _ in range(SAMPLES // copies):
            loc, scale = vae.encode(x)
            posterior = torch.distributions.Normal(loc, scale)
            z = loc + scale * torch.randn(loc.shape, generator=generator)
            prior = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
            log_p = prior.log_prob(z).sum(1) - nll(vae.decoder(z), x)
            log_w.append(log_p - posterior.log_prob(z).sum(1))
        found.append(torch.cat(log_w).logsumexp(0) - math.log(SAMPLES))
    return torch.stack(found)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    torch.set_num_threads(1)
    as_after_reading()
    torch.manual_seed(0)
    vae = build_vae((1, 28, 28), preset="lars-mnist").eval()
    images = (torch.rand(count, 1, 28, 28) < 0.2).float()
    prior = NoiseContrastivePrior([MLPRatio(50, hidden=(100, 100))], vae.prior).eval()

    def ours(**options: object) -> torch.Tensor:
        return importance_weighted_bounds(
            vae, images, SAMPLES, generator=stream(0, "ours"), **options
        ).base

    def loop() -> torch.Tensor:
        return per_image(vae, images, SAMPLES, cross_entropy)

    apart = (ours() - loop()).abs().max()  # two seeds of the same estimate
    shapes = [(300, i, o) for i, o in LAYERS]
    product = products(shapes)
    repeats = count * SAMPLES // 300
    seconds = interleaved(
        {
            "pythae": lambda: as_pythae(vae, images),
            "pythae without graph": torch.no_grad()(lambda: as_pythae(vae, images)),
            "loop": loop,
            "in pieces": lambda: per_image(vae, images, 100, clamped_logarithms),
            "ours": ours,
            "with NCP": lambda: ours(prior=prior, pool=torch.zeros(1023)),
            "product": lambda: [product() for _ in range(repeats)],
        },
        repeats=7,
        warmup=1,
        clock=time.process_time,
    )
    thousand = 1000 / count
    rate = flops(shapes) * repeats / seconds["product"] / 1e9
    show(
        f"NLL, {SAMPLES} importance samples, timed on {count} images",
        [
            ("pythae's way, 1000 images", f"{thousand * seconds['pythae']:.1f} s"),
            ("the same without a graph", f"{thousand * seconds['pythae without graph']:.1f} s"),
            ("1000 copies at once, 1000 images", f"{thousand * seconds['loop']:.1f} s"),
            ("100 copies at a time", f"{thousand * seconds['in pieces']:.1f} s"),
            ("ours, 1000 images", f"{thousand * seconds['ours']:.1f} s"),
            ("pythae's way / ours", f"{seconds['pythae'] / seconds['ours']:.2f} times as fast"),
            (
                "without a graph / ours",
                f"{seconds['pythae without graph'] / seconds['ours']:.2f} times as fast",
            ),
            ("1000 at once / ours", f"{seconds['loop'] / seconds['ours']:.2f} times as fast"),
            ("100 at a time / ours", f"{seconds['in pieces'] / seconds['ours']:.2f} times as fast"),
            ("ours with NCP and SNIS bounds", f"{thousand * seconds['with NCP']:.1f} s"),
            ("1000 at once (base alone) / that", f"{seconds['loop'] / seconds['with NCP']:.2f}"),
            ("decoder's matrix products alone", f"{rate:.0f} GFLOP/s"),
            ("products / ours", f"{seconds['product'] / seconds['ours']:.0%}"),
            ("largest difference of the two", f"{apart:.3f} nats, by the draws"),
        ],
    )


if __name__ == "__main__":
    main()
