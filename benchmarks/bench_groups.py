"""Many classifiers at a time, and SIR with the split first convolution and folded layers.

python benchmarks/bench_groups.py
"""

from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved, show
from torch import Tensor

from ncprior.numerics import stream
from ncprior.ratios import ConvRatio, nce_loss
from ncprior.samplers import sir
from ncprior.training.pairs import Pairs, draw_pairs
from ncprior.training.presets import PRESETS
from ncprior.training.stacks import Stacks
from ncprior.vaes import build_vae
from ncprior.walk import from_prior, walk

BATCH, GROUPS, PROPOSALS, IMAGES = 64, 10, 500, 2


def classifiers() -> None:
    """Ten small groups: one step of each classifier, from the walk to the gradients."""
    torch.manual_seed(0)
    vae = build_vae((1, 28, 28), preset="nvae-tiny", groups_per_scale=(GROUPS,)).eval()
    images = torch.rand(BATCH, 1, 28, 28).round()
    options = PRESETS["groups-small"]["network_options"]
    with torch.no_grad():
        evidence = vae.encode(images)

    def pairs_of(groups: list[int]) -> list[Pairs]:
        return draw_pairs(vae, evidence, BATCH, stream(0, "bench"), groups)

    pairs = pairs_of(list(range(GROUPS)))
    ratios = [
        ConvRatio(
            pair.posterior.shape[1:],
            context_shape=None if pair.context is None else pair.context.shape[1:],
            **options,
        )
        for pair in pairs
    ]
    together, alone = Stacks(ratios), [Stacks([ratio]) for ratio in ratios]

    def step(module: Stacks, pairs: list[Pairs]) -> None:
        nce_loss(*module(pairs)).sum().backward()

    seconds = interleaved(
        {
            "apart": lambda: [step(m, [p]) for m, p in zip(alone, pairs, strict=True)],
            "together": lambda: step(together, pairs),
            "apart, with walks": lambda: [step(m, pairs_of([k])) for k, m in enumerate(alone)],
            "together, with the walk": lambda: step(together, pairs_of(list(range(GROUPS)))),
        }
    )
    rows = [(name, f"{1e3 * value:.0f} ms") for name, value in seconds.items()]
    classifiers_alone = seconds["apart"] / seconds["together"]
    whole = seconds["apart, with walks"] / seconds["together, with the walk"]
    show(
        f"A step of {GROUPS} classifiers on 8 x 4x4 latents, batch {BATCH}",
        [
            *rows,
            ("apart / together, classifiers", f"{classifiers_alone:.2f}"),
            ("apart / together, with walks", f"{whole:.2f}"),
        ],
    )


class Concatenated:
    """The same network as one would write it: z and its context stacked for each proposal.

    Its layers are run one by one; ours are folded for sampling (`ratios.folded`).
    """

    def __init__(self, ratio: ConvRatio, context: Tensor) -> None:
        self.ratio, self.context = ratio, context
        self.weight = torch.cat([ratio.stem.weight, ratio.context_stem.weight], 1)

    def __call__(self, z: Tensor, rows: slice) -> Tensor:
        ratio, (j, m) = self.ratio, z.shape[:2]
        context = ratio.context_norm(self.context[rows].repeat_interleave(m, 0))
        both = torch.cat([z.flatten(0, 1), context], 1)
        x = F.conv2d(both, self.weight, ratio.stem.bias, padding=1)
        return ratio._logits(x).view(j, m)


@torch.no_grad()
def split_convolution(name: str, image_shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """SIR of one group of a published NVAE with and without computing the context's part once."""
    torch.manual_seed(0)
    vae = build_vae(image_shape, preset=name).eval()
    groups: list[Any] = []
    generator = stream(0, "bench")

    def choose(k: int, group: Any) -> Tensor:
        groups.append(group)
        return from_prior(generator)(k, group)

    walk(vae, choose, IMAGES, groups=2)
    group = groups[1]
    assert group.context is not None
    shape = vae.latent_shapes[1]
    ratio = ConvRatio(shape, context_shape=group.context.shape[1:], **options).eval()

    def run(weigh: Any) -> Tensor:
        return sir(
            lambda i, m, g: torch.randn((m, *shape), generator=g),
            weigh, IMAGES, PROPOSALS, generator=stream(1, "bench"), chunk=ratio.chunk,
        ).samples  # fmt: skip

    def split() -> Tensor:
        embedded = ratio.embed(group.context)
        assert embedded is not None
        return run(lambda z, rows: ratio.weigh(z, embedded[rows]))

    def concatenated() -> Tensor:
        return run(Concatenated(ratio, group.context))

    assert torch.equal(split(), concatenated())  # the same picks
    seconds = interleaved({"concatenated": concatenated, "split": split}, repeats=7, warmup=1)
    context = tuple(group.context.shape[1:])
    show(
        f"SIR, {PROPOSALS} proposals, {name}: latents {tuple(shape)}, context {context}",
        [
            ("concatenated", f"{1e3 * seconds['concatenated'] / IMAGES:.0f} ms an image"),
            ("split", f"{1e3 * seconds['split'] / IMAGES:.0f} ms an image"),
            ("concatenated / split", f"{seconds['concatenated'] / seconds['split']:.2f}"),
        ],
    )


if __name__ == "__main__":
    classifiers()
    small = PRESETS["groups-small"]["network_options"]
    large = PRESETS["groups"]["network_options"]
    split_convolution("nvae-tiny", (1, 28, 28), small)
    split_convolution("nvae-mnist-small", (1, 28, 28), small)
    split_convolution("nvae-mnist-small", (1, 28, 28), large)
    split_convolution("nvae-cifar10", (3, 32, 32), small)
    split_convolution("nvae-cifar10", (3, 32, 32), large)
