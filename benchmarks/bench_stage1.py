"""A training step of the MNIST recipe against a plain PyTorch step of the same model.

NCPRIOR_DATA=... python benchmarks/bench_stage1.py     (random images without the variable)
"""

import os

import torch
import torch.nn.functional as F
from common import flops, interleaved, products, show
from torch import nn

from ncprior.data import ImageDataset, load_data
from ncprior.training.loop import Place, make_fabric, optimise
from ncprior.training.vae import _VAEJob
from ncprior.vaes import build_vae

BATCH, STEPS = 256, 100


def mnist() -> ImageDataset:
    if "NCPRIOR_DATA" in os.environ:
        return load_data("idx", "mnist", binarize="dynamic")[0]
    images = torch.randint(0, 256, (20_000, 1, 28, 28), dtype=torch.uint8)
    images[torch.rand(images.shape) < 0.8] = 0
    return ImageDataset(images, binarize="dynamic")


class Plain:
    """The step as one would write it: bernoulli pixels, torch.distributions, Adam."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images.flatten(1).float() / 255
        self.encoder = nn.Sequential(
            nn.Linear(784, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 100)
        )
        self.decoder = nn.Sequential(
            nn.Linear(50, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 784)
        )
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def step(self) -> None:
        rows = torch.randint(len(self.images), (BATCH,))
        x = torch.bernoulli(self.images[rows])
        loc, raw = self.encoder(x).chunk(2, 1)
        q = torch.distributions.Normal(loc, F.softplus(raw))
        z = q.rsample()
        p = torch.distributions.Normal(torch.zeros_like(loc), torch.ones_like(loc))
        kl = torch.distributions.kl_divergence(q, p).sum(1)
        nll = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)
        loss = (nll + kl).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()


def main() -> None:
    torch.manual_seed(0)
    data = mnist()
    assert isinstance(data.images, torch.Tensor)
    plain = Plain(data.images)
    vae = build_vae(data.image_shape, preset="lars-mnist")
    rows = torch.arange(20_000)
    fabric = make_fabric("cpu")

    def ours() -> None:
        job = _VAEJob(
            vae,
            data,
            rows,
            rows[:10],
            batch_size=BATCH,
            warmup_steps=0,
            seed=0,
            device=fabric.device,
        )
        optimise(
            job, fabric, place=Place(), steps=STEPS, learning_rate=1e-3,
            evaluate_every=STEPS, progress=False,
        )  # fmt: skip

    layers = [(784, 300), (300, 300), (300, 100), (50, 300), (300, 300), (300, 784)]
    shapes = [(BATCH, i, o) for i, o in layers]  # forward
    shapes += [(i, BATCH, o) for i, o in layers] + [
        (BATCH, o, i) for i, o in layers[1:]
    ]  # backward
    product = products(shapes)
    seconds = interleaved(
        {
            "product": lambda: [product() for _ in range(STEPS)],
            "plain": lambda: [plain.step() for _ in range(STEPS)],
            "ours": ours,
        }
    )
    per_step = {name: 1e3 * value / STEPS for name, value in seconds.items()}
    show(
        f"Stage 1, MNIST recipe, batch {BATCH}, {flops(shapes) / 1e9:.2f} GFLOP a step",
        [
            ("matrix products alone", f"{per_step['product']:.2f} ms"),
            ("plain step", f"{per_step['plain']:.2f} ms"),
            ("our step", f"{per_step['ours']:.2f} ms"),
            ("plain / ours", f"{per_step['plain'] / per_step['ours']:.2f}"),
            ("products / ours", f"{per_step['product'] / per_step['ours']:.0%}"),
        ],
    )


if __name__ == "__main__":
    main()
