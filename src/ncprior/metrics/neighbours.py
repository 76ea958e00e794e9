"""Nearest training images of samples, and how to tell from them whether samples were memorised."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncprior.metrics.features import check_images
from ncprior.numerics import Estimate

SMALL = 64  # pixels a side: larger images are averaged down to it
CROP = 40
NUMBERS_AT_ONCE = 1 << 24  # of a matrix of distances in single precision, 64 MiB
SPARE = 16  # candidates beyond those asked for
LEAST = 20  # held-out images, for a quantile of 5 %
NEAR = 0.05  # share of held-out images that are called near a training image


class Nearest(NamedTuple):
    distance: Tensor  # (n, k), ascending, float64
    row: Tensor  # (n, k), rows of the references


def as_compared(images: Tensor) -> Tensor:
    """What images (n, c, h, w) are compared by, (n, numbers), float32.

    Images of 64 pixels a side or more are averaged down to 64 by 64, of which the middle 40 by 40
    are taken; smaller ones are taken as they are.

    Reference: section 5.3 of the paper (arXiv 2010.02917).
    """
    check_images(images)
    images = images.float()
    if min(images.shape[-2:]) >= SMALL:
        if tuple(images.shape[-2:]) != (SMALL, SMALL):
            images = F.interpolate(images, (SMALL, SMALL), mode="area")
        first = (SMALL - CROP) // 2
        images = images[..., first : first + CROP, first : first + CROP]
    return images.flatten(1)


def nearest(queries: Tensor, references: Tensor, k: int = 1) -> Nearest:
    """The k nearest references of each query by Euclidean distance: exact, by brute force.

    Candidates come from one matrix product in single precision, a block of queries at a time, and
    are ranked in double precision. A query whose candidates rounding might have spoilt is searched
    again in double precision; so the result is that of an exhaustive search.

    Args:
        queries: (n, f).
        references: (m, f).
        k: Neighbours, at most m.

    Raises:
        ValueError: unequal width, numbers that are not finite, or k out of range.
    """
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1]:
        raise ValueError(
            "queries and references must be (n, f) and (m, f), got "
            f"{tuple(queries.shape)} and {tuple(references.shape)}"
        )
    if not (queries.isfinite().all() and references.isfinite().all()):
        raise ValueError("queries and references must be finite, found NaN or infinity")
    if not 1 <= k <= len(references):
        raise ValueError(f"k must be between 1 and {len(references)}, got {k}")
    centre = references.mean(0)
    x, y = (queries - centre).float(), (references - centre).float()
    spare = min(k + SPARE, len(y))
    norms = y.square().sum(1)  # (m,)
    # Rounding of a product of f terms, worst case, and of the centred numbers themselves.
    unit = (2 * x.shape[1] + 8) * torch.finfo(torch.float32).eps
    largest = float(norms.amax().sqrt())
    distances, rows = [], []
    for first in range(0, len(x), max(1, NUMBERS_AT_ONCE // len(y))):
        part = x[first : first + max(1, NUMBERS_AT_ONCE // len(y))]
        squared = torch.addmm(norms, part, y.T, alpha=-2)  # but for |x|^2, (b, m)
        rough, which = squared.topk(spare, 1, largest=False)
        size = part.square().sum(1)
        exact = _exact(queries[first : first + len(part)], references, which)
        order = exact.argsort(1)[:, :k]
        found, picked = exact.gather(1, order), which.gather(1, order)
        if spare < len(y):
            slack = unit * (size.sqrt() + largest) ** 2
            unsure = found[:, -1].square() > (rough[:, -1] + size - slack).double()
            for i in unsure.nonzero().flatten():
                again = (references.double() - queries[first + i].double()).square().sum(1).sqrt()
                found[i], picked[i] = again.topk(k, largest=False)
        distances.append(found)
        rows.append(picked)
    return Nearest(torch.cat(distances), torch.cat(rows))


def _exact(queries: Tensor, references: Tensor, which: Tensor) -> Tensor:
    """Distances of each query to its candidates, (n, spare), in double precision."""
    found = torch.empty(which.shape, dtype=torch.float64)
    for part in torch.arange(len(queries)).split(256):
        there = references[which[part]].double() - queries[part, None].double()
        found[part] = there.square().sum(2).sqrt()
    return found


class Memorised(NamedTuple):
    """How samples lie to training images, against images that the model has not seen."""

    near: Estimate
    """Share of samples nearer to a training image than all but 5 % of held-out images are; 0.05
    for samples that are like new images. Smooth samples come nearer without being copies."""
    closer_to_train: Estimate
    """Share of samples with a training image nearer than any of as many held-out images; 0.5
    where nothing was memorised, however smooth the samples."""


def memorised(
    samples: Tensor, training: Tensor, heldout: Tensor, *, typical: Tensor | None = None
) -> Memorised:
    """Whether samples lie nearer to training images than images do that were not trained on.

    `near` compares distances to all training images; its error is for this training set, from the
    draw of samples and of held-out images. `closer_to_train` asks on which side the nearest image
    lies, among all held-out images and as many of training, taken at even steps; its error counts
    the images that are nearest to some sample, not the samples, of which many may share one (it
    is a quarter too large in simulations).

    Args:
        samples: (n, f), as `as_compared` gives them; at least 2.
        training: (m, f), all of them.
        heldout: (h, f), images of the same law that the model was not trained on, 20 at least and
            no more than training images.
        typical: Distances (h,) of the held-out images to their nearest training images, where they
            are known already: most of the work is to find them.

    Raises:
        ValueError: too few rows, or as for `nearest`.

    Reference: Meehan, Chaudhuri and Dasgupta (AISTATS 2020) for comparing with held-out images.
    """
    if len(samples) < 2 or not LEAST <= len(heldout) <= len(training):
        raise ValueError(
            f"samples must be at least 2, held-out images between {LEAST} and the number of "
            f"training images, got {len(samples)}, {len(heldout)} and {len(training)}"
        )
    h = len(heldout)
    typical = nearest(heldout, training).distance[:, 0] if typical is None else typical
    if typical.shape != (h,):
        raise ValueError(f"typical must have the shape ({h},), got {tuple(typical.shape)}")
    to_train = nearest(samples, training).distance[:, 0]
    both = torch.cat([training[torch.arange(h) * len(training) // h], heldout])
    return Memorised(_near(to_train, typical), _side(nearest(samples, both).row[:, 0], h))


def _near(samples: Tensor, heldout: Tensor) -> Estimate:
    """The share of samples' distances below the quantile of held-out ones, with its error."""
    low, threshold, high = heldout.quantile(
        torch.tensor([NEAR / 2, NEAR, 3 * NEAR / 2], dtype=torch.float64)
    )
    share = float((samples < threshold).double().mean())
    # A threshold that is off by a share of held-out images is off by so much of a share of samples.
    slope = float(((samples >= low) & (samples < high)).double().mean()) / NEAR
    n = len(samples) + 4
    drawn = (share * len(samples) + 2) / n  # not 0 nor 1, where an error of 0 would be wrong
    variance = drawn * (1 - drawn) / n + slope**2 * NEAR * (1 - NEAR) / len(heldout)
    return Estimate(share, math.sqrt(variance))


def _side(rows: Tensor, first: int) -> Estimate:
    """The share of rows before `first`; samples with the same row count as one draw of its side."""
    share = float((rows < first).double().mean())
    images, counts = rows.unique(return_counts=True)
    apart = (images < first).double() - share
    return Estimate(share, float((counts * apart).square().sum().sqrt()) / len(rows))
