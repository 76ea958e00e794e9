"""Witnesses: holes that are known, one that averages out over contexts, and none at all."""

import math

import pytest
import torch

from ncprior.group_witness import fit_witness

SIZE, CONTEXT = 16, 4


def null(n, d, g):
    """Equal laws, posterior draws of one image being alike (correlation 0.8)."""
    image = torch.randn(n, 1, SIZE, generator=g)
    return math.sqrt(0.8) * image + math.sqrt(0.2) * torch.randn(n, d, SIZE, generator=g)


def draws(kind, n, d, g):
    """(posterior, prior, context) of n images with d draws each."""
    context, prior = (torch.randn(n, *shape, generator=g) for shape in ((CONTEXT,), (d, SIZE)))
    posterior = null(n, d, g)
    if kind == "shift":
        posterior[..., 0] += 0.5
    if kind == "averages out":  # its mean over contexts is 0
        posterior[..., 0] += 0.5 * context[:, :1]
    if kind == "two peaks":  # of variance 1
        sign = torch.randint(0, 2, (n, 1), generator=g) * 2 - 1
        posterior[..., 0] = 0.9 * sign + math.sqrt(0.19) * posterior[..., 0]
    return posterior, prior, context


def gap(kind, g, images=1000):
    """Mean and standard error over images that the witness has not seen."""
    witness = fit_witness(*draws(kind, images, 2, g))
    q, p, context = draws(kind, images, 2, g)
    of_images = (witness(q, context) - witness(p, context)).mean(1).double()
    return float(of_images.mean()), float(of_images.std()) / math.sqrt(images)


@pytest.mark.parametrize("kind", ["shift", "averages out", "two peaks"])
def test_holes_are_seen(kind):
    """A shift of 0.5 s.d. alone gives 0.5; 10 errors are a third of that."""
    value, se = gap(kind, torch.Generator().manual_seed(0))
    assert value > 6 * se and value > 0.2


def test_a_shift_is_measured_in_standard_deviations():
    """The best function is z_0 itself, whose gap is 0.5; others cost it a tenth at most."""
    value, se = gap("shift", torch.Generator().manual_seed(1))
    assert 0.45 - 4 * se < value < 0.5 + 4 * se


def test_equal_laws_give_standard_normal_scores():
    """Of 40 scores the squares sum to a chi square of 40 degrees, of standard deviation 9.

    That the draws of an image are alike must not make the error too small: were they counted as
    independent, the sum would be larger by a factor of 1.4.
    """
    g = torch.Generator().manual_seed(0)
    scores = [value / se for value, se in (gap("null", g, 300) for _ in range(40))]
    assert 40 - 3.5 * 9 < sum(score**2 for score in scores) < 40 + 3.5 * 9
    assert abs(sum(scores)) < 4 * math.sqrt(40)


def test_without_context_and_with_few_images():
    q, p, _ = draws("shift", 200, 2, torch.Generator().manual_seed(0))
    witness = fit_witness(q, p)
    assert witness(q).shape == (200, 2) and float((witness(q) - witness(p)).mean()) > 0.3
    with pytest.raises(ValueError, match="at least 8 images, got 7"):
        fit_witness(q[:7], p[:7])
