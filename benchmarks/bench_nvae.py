"""A training step of a small NVAE against the bare convolutions in it, forwards and backwards.

The step has all that NVAE is trained with: balanced KL, the penalty on norms, Adamax.

    python benchmarks/bench_nvae.py
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, show
from torch import Tensor, nn

from ncprior.data import ImageDataset
from ncprior.training.loop import Place, make_fabric, optimise
from ncprior.training.vae import Elbo, _VAEJob
from ncprior.vaes import build_vae

PRESET, SHAPE, BATCH, STEPS = "nvae-tiny", (1, 28, 28), 64, 3


def convolutions(vae: Any, images: Tensor) -> tuple[Callable[[], None], int, float]:
    """The convolutions of one step on tensors kept for them, their number and their GFLOP."""
    calls: list[tuple[Tensor, Tensor, Tensor, nn.Conv2d]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        x = torch.randn_like(inputs[0]).requires_grad_()
        weight = torch.randn_like(layer.weight).requires_grad_()
        calls.append((x, weight, torch.randn_like(output), layer))

    layers = [part for part in vae.modules() if isinstance(part, nn.Conv2d)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    Elbo(vae)(images)
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for x, weight, gradient, layer in calls:
            y = F.conv2d(x, weight, None, layer.stride, layer.padding, groups=layer.groups)  # type: ignore[arg-type]
            torch.autograd.grad(y, (x, weight), gradient)

    # Forwards, and backwards to input and weight: three times two per weight and position.
    flops = sum(6 * y.numel() * weight[0].numel() for _, weight, y, _ in calls)
    return run, len(calls), flops / 1e9


def main(preset: str = PRESET, batch: int = BATCH, steps: int = STEPS, repeats: int = 5) -> None:
    torch.manual_seed(0)
    data = ImageDataset(torch.randint(0, 256, (20 * batch, *SHAPE), dtype=torch.uint8))
    rows = torch.arange(len(data))
    vae = build_vae(SHAPE, preset=preset).train()
    bare, count, flops = convolutions(vae, data.batch(rows[:batch]))
    fabric = make_fabric("cpu")

    def ours() -> None:
        job = _VAEJob(
            vae, data, rows, rows[:2], batch_size=batch, warmup_steps=1e6, balanced=True,
            norm_penalty=0.01, seed=0, device=fabric.device, fabric=fabric,
        )  # fmt: skip
        job.evaluate = lambda step: {}  # type: ignore[method-assign]
        # The first step of a run has ten times the power iterations of all others: leave it out.
        loss = job.loss
        job.loss = lambda model, step, generator: loss(model, step + 1, generator)  # type: ignore[method-assign]
        optimise(
            job, fabric, place=Place(), steps=steps, learning_rate=1e-3, optimizer="adamax",
            eps=1e-3, evaluate_every=steps, progress=False,
        )  # fmt: skip

    seconds = interleaved(
        {"bare": lambda: [bare() for _ in range(steps)], "ours": ours}, repeats, warmup=1
    )
    per_step = {name: 1e3 * value / steps for name, value in seconds.items()}
    show(
        f"NVAE, {preset}, batch {batch}, {count} convolutions, {flops:.1f} GFLOP a step",
        [
            ("convolutions alone", f"{per_step['bare']:.0f} ms"),
            ("training step", f"{per_step['ours']:.0f} ms"),
            ("convolutions / step", f"{per_step['bare'] / per_step['ours']:.0%}"),
        ],
    )


if __name__ == "__main__":
    main()
