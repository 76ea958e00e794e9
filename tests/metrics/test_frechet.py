import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ncprior.metrics import frechet_distance, frechet_estimates, moment_blocks
from ncprior.metrics.frechet import merge, moments, streamed_moments
from ncprior.numerics import jackknife


def features(n, rng, size=4, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, size, generator=rng, dtype=torch.float64)


def distance(a, b):
    return frechet_distance(moment_blocks(a), moment_blocks(b))


def test_against_scipy(rng):
    mix = torch.randn(5, 5, generator=rng, dtype=torch.float64)
    a, b = features(80, rng, 5) @ mix, features(60, rng, 5, 2.0, 0.3)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    ca, cb = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    expected = float(gap) + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_spherical_gaussians(rng):
    """|shift|^2 + d (s - t)^2, plus a bias below d (d + 1) (s^2 + t^2) / n."""
    n, d, s, t, shift = 20_000, 3, 1.0, 0.6, 0.5
    found = distance(features(n, rng, d, s), features(n, rng, d, t, shift))
    expected = d * (shift**2 + (s - t) ** 2)
    # Delta method: sd of |mean gap|^2 and of d (s - t)^2 from n draws each.
    variance = 4 * shift**2 * d * (s**2 + t**2) / n + 4 * (s - t) ** 2 * d * (s**2 + t**2) / (2 * n)
    bias = d * (d + 1) * (s**2 + t**2) / n
    assert abs(found - expected) < 4 * math.sqrt(variance) + bias


def test_of_a_set_with_itself_is_zero(rng):
    a = features(50, rng)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)


def test_symmetric_and_unmoved_by_rotation_and_shift(rng):
    a, b = features(50, rng), features(70, rng, scale=2.0, shift=1.0)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=rng, dtype=torch.float64))
    assert distance(b, a) == pytest.approx(distance(a, b))
    assert distance(a @ rotation + 7, b @ rotation + 7) == pytest.approx(distance(a, b))


def test_fewer_rows_than_features(rng):
    """Singular covariances: for one-point spreads the trace terms are exact."""
    found = distance(features(3, rng, 10), features(4, rng, 10))
    assert math.isfinite(found) and found > 0


def test_moments_add(rng):
    x = features(53, rng)
    whole, parts = moments(x), merge(moment_blocks(x))
    assert whole[0] == parts[0] == 53  # the count
    torch.testing.assert_close(parts.total, whole.total)
    torch.testing.assert_close(parts.outer, whole.outer)
    assert len(moment_blocks(x)) == 20 and len(moment_blocks(x[:2])) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 3), r"n of at least 2, got \(1, 3\)"),
        (torch.zeros(3), "n of at least 2"),
        (torch.full((4, 2), math.nan), "must be finite"),
        (torch.full((4, 2), math.inf), "must be finite"),
    ],
)
def test_features_that_cannot_be_measured(wrong, message):
    with pytest.raises(ValueError, match=message):
        moment_blocks(wrong)


def test_jackknife_error_against_the_spread_of_many_runs(rng):
    """The error's root mean square over 200 runs is the spread of the distance.

    The spread has a relative error of 1 / sqrt(400) = 5 %; the mean of 200 jackknife variances of
    20 blocks, sqrt(2 / 19 / 200) / 2 = 1.2 %. The jackknife is biased upwards by O(1/n), here 2 %.
    """
    found = []
    for _ in range(200):
        a, b = features(400, rng, 3), features(300, rng, 3, 1.3, 0.4)
        found.append(jackknife(frechet_distance, moment_blocks(a), moment_blocks(b)))
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    said = torch.tensor([f.se for f in found], dtype=torch.float64).square().mean().sqrt()
    assert float(said / values.std()) == pytest.approx(1, abs=4 * 0.052 + 0.02)


def test_against_torchmetrics(rng):
    """Theirs multiplies the covariances and takes general eigenvalues; no code is shared."""
    fid = pytest.importorskip("torchmetrics.image.fid")
    mix = torch.randn(16, 16, generator=rng, dtype=torch.float64)
    a = torch.rand(300, 16, generator=rng, dtype=torch.float64) @ mix
    b = torch.rand(200, 16, generator=rng, dtype=torch.float64).square() @ mix

    class Flat(torch.nn.Module):
        num_features = 16

        def forward(self, x):
            return x.flatten(1)

    theirs = fid.FrechetInceptionDistance(Flat(), normalize=True, input_img_size=(1, 4, 4))
    theirs.set_dtype(torch.float64)
    theirs.update(a.view(-1, 1, 4, 4), real=True)
    theirs.update(b.view(-1, 1, 4, 4), real=False)
    assert distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)


@pytest.mark.parametrize("size", [7, 1100])
def test_streamed_moments(rng, size):
    """Batches of any size make the moments of the whole; wide products are made by halves."""
    x = features(500, rng, size)
    found, whole = streamed_moments(x.split(64)), moments(x)
    assert found.num == whole.num
    torch.testing.assert_close(found.total, whole.total)
    torch.testing.assert_close(found.outer, whole.outer)
    assert streamed_moments(part.float() for part in x.split(64)).outer.dtype == torch.float64


@pytest.mark.parametrize("bad", [[], [torch.zeros(3)], [torch.full((3, 2), math.nan)]])
def test_batches_that_cannot_be_measured(bad):
    with pytest.raises(ValueError, match=r"batches must hold|features must be \(n, f\) and finite"):
        streamed_moments(bad)


def test_constant_features():
    with pytest.raises(ValueError, match="must differ from image to image, but all 9 rows"):
        moment_blocks(torch.ones(9, 3))


def test_plain_estimate_and_error_are_those_of_the_jackknife(rng):
    """One root of a covariance serves all blocks of the other set; the figures are the same."""
    a, b = moment_blocks(features(200, rng)), moment_blocks(features(150, rng, 4, 1.5))
    found, expected = frechet_estimates(a, b), jackknife(frechet_distance, a, b)
    assert found.plain.value == pytest.approx(expected.value, rel=1e-12)
    assert found.plain.se == pytest.approx(expected.se, rel=1e-9)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.3, 0.2)])
def test_extrapolated_to_infinity(scale, shift, rng):
    """Over many small sets the plain value is far too large on average, the limit's is right."""
    n, d, runs = 150, 8, 60
    expected = d * (shift**2 + (scale - 1) ** 2)
    found = [
        frechet_estimates(
            moment_blocks(features(n, rng, d)), moment_blocks(features(n, rng, d, scale, shift))
        )
        for _ in range(runs)
    ]
    plain = torch.tensor([f.plain.value for f in found], dtype=torch.float64)
    limit = torch.tensor([f.at_infinity.value for f in found], dtype=torch.float64)
    # 4 standard errors of the mean over runs, and the next term of the bias, of the order of
    # d (d + 1) d / n^2 = 0.03, which the line leaves.
    assert abs(limit.mean() - expected) < 4 * limit.std() / math.sqrt(runs) + 0.03
    assert plain.mean() - expected > 0.3


def test_error_at_infinity_against_the_spread_of_many_runs(rng):
    """As for the plain value above; the line adds a little to the spread, not to the error."""
    found = []
    for _ in range(100):
        a, b = features(400, rng, 3), features(300, rng, 3, 1.3, 0.4)
        found.append(frechet_estimates(moment_blocks(a), moment_blocks(b)).at_infinity)
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    said = torch.tensor([f.se for f in found], dtype=torch.float64).square().mean().sqrt()
    # The spread of 100 runs has a relative error of 1 / sqrt(200) = 7 %.
    assert float(said / values.std()) == pytest.approx(1, abs=4 * 0.072 + 0.02)


def test_one_block_has_no_error(rng):
    blocks = moment_blocks(features(10, rng))
    with pytest.raises(ValueError, match="at least 2 blocks each, got 1 and"):
        frechet_estimates(blocks[:1], blocks)
