import math

import pytest
import torch

from ncprior.metrics import kernel, kid, mean_of_terms, median_bandwidth, mmd, mmd_terms


def features(n, rng, size=3, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, size, generator=rng, dtype=torch.float64)


def direct(x, y, bandwidth):
    """Eq. 4 of Gretton et al., pair by pair."""

    def k(a, b):
        return math.exp(-float((a - b).square().sum()) / (2 * bandwidth**2))

    n = len(x)
    total = sum(
        k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
        for i in range(n)
        for j in range(n)
        if i != j
    )
    return total / (n * (n - 1))


def of_gaussians(size, scale_x, scale_y, shift, bandwidth):
    """MMD^2 between N(0, scale_x^2 I) and N(shift, scale_y^2 I) in `size` dimensions."""

    def mean(variance, gap):
        wide = bandwidth**2 + variance
        return (bandwidth**2 / wide) ** (size / 2) * math.exp(-size * gap**2 / (2 * wide))

    same = mean(2 * scale_x**2, 0) + mean(2 * scale_y**2, 0)
    return same - 2 * mean(scale_x**2 + scale_y**2, shift)


@pytest.mark.parametrize("at_once", [1 << 21, 100, 1])
def test_against_a_sum_over_pairs(rng, monkeypatch, at_once):
    """Also when the kernel is computed a few rows at a time; far from 0, in float32."""
    monkeypatch.setattr(kernel, "NUMBERS_AT_ONCE", at_once)
    x, y = features(23, rng, shift=50.0), features(23, rng, scale=1.5, shift=50.3)
    assert mmd(x, y, 1.3).value == pytest.approx(direct(x, y, 1.3), rel=1e-9)
    single = mmd(x.float(), y.float(), 1.3)
    assert single.value == pytest.approx(direct(x, y, 1.3), abs=1e-4)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.4), (1.5, 0.0), (0.7, 0.2)])
def test_closed_form_of_gaussians(rng, scale, shift):
    found = mmd(features(3000, rng), features(3000, rng, scale=scale, shift=shift), 2.0)
    expected = of_gaussians(3, 1.0, scale, shift, 2.0)
    assert abs(found.value - expected) < 4 * found.se
    assert expected > 10 * found.se  # else nothing was tested


def test_unbiased_and_error_right_over_many_runs(rng):
    """Also where row i of y goes with row i of x: leaving such pairs in would give 0.015 more.

    The mean over 400 runs has 4 standard errors of tolerance. The spread of 400 values is known to
    1 / sqrt(800) = 3.5 %; 4 of those, and 2 / n for the jackknife's own bias.
    """
    n, runs, found = 60, 400, []
    for _ in range(runs):
        x = features(n, rng)
        found.append(mmd(x, 0.6 * x + 0.8 * features(n, rng) + 0.5, 1.5))
    values = torch.tensor([f.value for f in found])
    expected = of_gaussians(3, 1.0, 1.0, 0.5, 1.5)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(runs)
    claimed = torch.tensor([f.se for f in found]).square().mean().sqrt()
    assert float(claimed / values.std()) == pytest.approx(1, abs=4 * 0.035 + 2 / n)


def test_equal_laws_give_zero_on_average(rng):
    """The jackknife's error is then too large by sqrt(2); spread known as above."""
    found = [mmd(features(50, rng), features(50, rng), 1.5) for _ in range(400)]
    values = torch.tensor([f.value for f in found])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(400)
    assert (values < 0).sum() > 100  # unbiased: no clipping
    claimed = torch.tensor([f.se for f in found]).square().mean().sqrt()
    assert 1.2 < float(claimed / values.std()) < 1.65


def test_error_is_the_delete_one_jackknife(rng):
    x, y = features(12, rng), features(12, rng, shift=1.0)
    keep = [[j for j in range(12) if j != i] for i in range(12)]
    left_out = torch.tensor([direct(x[rows], y[rows], 1.5) for rows in keep])
    expected = math.sqrt(11 * float(left_out.var(correction=0)))
    assert mmd(x, y, 1.5).se == pytest.approx(expected, rel=1e-6)


def test_a_difference_of_two_has_a_smaller_error_than_its_parts(rng):
    """Both share x: y and z differ little, and the terms say so."""
    x, y = features(300, rng), features(300, rng, shift=0.8)
    first, second = mmd_terms(x, y, 2.0), mmd_terms(x, 0.98 * y, 2.0)
    gap = mean_of_terms(first - second)
    assert gap.value == pytest.approx(mmd(x, y, 2.0).value - mmd(x, 0.98 * y, 2.0).value)
    assert gap.se < mmd(x, y, 2.0).se / 3


def test_median_bandwidth(rng):
    """Between draws of N(0, I_100) squared distances are 2 chi^2_100, of median 2 * 99.3."""
    found = median_bandwidth(features(1500, rng, 100), features(1500, rng, 100))
    assert found == pytest.approx(math.sqrt(2 * 99.334), rel=0.01)
    points = torch.tensor([[0.0], [1.0], [4.0]])
    assert median_bandwidth(points) == 3.0
    assert mmd(points, points + 1) == mmd(points, points + 1, median_bandwidth(points, points + 1))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(5, 2), r"\(4, 2\) and \(5, 2\)"),
        (torch.zeros(4), torch.zeros(4), "must both be"),
        (torch.zeros(2, 1), torch.zeros(2, 1), "at least 3"),
        (torch.full((4, 1), math.nan), torch.zeros(4, 1), "finite"),
    ],
)
def test_rejects_what_cannot_be_compared(x, y, message):
    with pytest.raises(ValueError, match=message):
        mmd(x, y, 1.0)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_rejects_bandwidths(bandwidth):
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        mmd(torch.zeros(4, 1), torch.ones(4, 1), bandwidth)


def test_one_point_has_no_bandwidth():
    with pytest.raises(ValueError, match="most are the same"):
        mmd(torch.zeros(4, 1), torch.zeros(4, 1))


def test_kid_pair_by_pair(rng):
    x, y = features(6, rng), features(5, rng, scale=1.4)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    within = [
        sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)
        / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    cross = sum(k(a, b) for a in x for b in y) / 30
    assert kid(x, y).value == pytest.approx(sum(within) - 2 * cross)


def test_kid_error_is_the_jackknife_done_by_hand(rng):
    x, y = features(9, rng), features(7, rng, scale=1.4, shift=0.3)
    variance = 0.0
    for rows, value in (
        (x, lambda kept: kid(x[kept], y).value),
        (y, lambda kept: kid(x, y[kept]).value),
    ):
        n = len(rows)
        left_out = [value(torch.arange(n) != i) for i in range(n)]
        variance += (n - 1) * float(torch.tensor(left_out, dtype=torch.float64).var(correction=0))
    assert kid(x, y).se == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_kid_against_torchmetrics(rng):
    """Their one subset of everything is our U-statistic; they keep single precision."""
    theirs = pytest.importorskip("torchmetrics.image.kid")
    x, y = features(40, rng, 9), features(40, rng, 9, 1.2, 0.3)

    class Flat(torch.nn.Module):
        num_features = 9

        def forward(self, images):
            return images.flatten(1)

    metric = theirs.KernelInceptionDistance(Flat(), subsets=1, subset_size=40, normalize=True)
    metric.set_dtype(torch.float64)
    metric.update(x.view(-1, 1, 3, 3), real=True)
    metric.update(y.view(-1, 1, 3, 3), real=False)
    assert kid(x, y).value == pytest.approx(float(metric.compute()[0]), rel=1e-6)


def test_kid_of_gaussians(rng):
    """For N(0, I) and N(m, I) the kernel's three powers give 3 |m|^2/f + ... in closed form.

    E (a.b / f + 1)^3 = 1 + 3 E(a.b) / f + 3 E(a.b)^2 / f^2 + E(a.b)^3 / f^3, and for a of N(p, I)
    and b of N(q, I): E a.b = p.q, E(a.b)^2 = f + |p|^2 + |q|^2 + (p.q)^2, and E(a.b)^3 =
    (p.q)^3 + 3 p.q (f + 2 + |p|^2 + |q|^2).
    """
    f, shift = 4, 0.5

    def expected(p, q):  # inner product and squared norms of means p 1 and q 1
        dot, norms = f * p * q, f * (p * p + q * q)
        second = f + norms + dot**2
        third = dot**3 + 3 * dot * (f + 2 + norms)
        return 1 + 3 * dot / f + 3 * second / f**2 + third / f**3

    truth = expected(0, 0) + expected(shift, shift) - 2 * expected(0, shift)
    found = [kid(features(300, rng, f), features(200, rng, f, shift=shift)) for _ in range(100)]
    values = torch.tensor([v.value for v in found], dtype=torch.float64)
    assert abs(values.mean() - truth) < 4 * values.std() / 10
    said = torch.tensor([v.se for v in found], dtype=torch.float64).square().mean().sqrt()
    # 7 % from the spread of 100 runs, 5 % from the jackknife's own bias at 200 rows.
    assert float(said / values.std()) == pytest.approx(1, abs=4 * 0.072 + 0.05)


def test_kid_raises_no_more_false_alarms_than_it_says(rng):
    """Equal laws, 200 repeats, one-sided at 5 %: by blocks as often, by the U-statistic rarer.

    With 10 blocks the value over its error follows Student's t with 9 degrees of freedom. 200
    repeats count 10 alarms with a standard deviation of 3.1: 22 is 4 of them too many, and none at
    all has a chance of 4e-5.
    """
    by_blocks = by_all = 0
    for _ in range(200):
        x, y = features(300, rng, 4), features(300, rng, 4)
        found, whole = kid(x, y, block_rows=30), kid(x, y)
        by_blocks += found.value > 1.833 * found.se
        by_all += whole.value > 1.645 * whole.se
    assert 1 <= by_blocks <= 22 and by_all <= 22


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.ones(4, 2), torch.eye(4, 2), {}, "x must differ from image to image"),
        (torch.eye(4, 2), torch.full((4, 2), math.nan), {}, "y must be finite"),
        (torch.eye(4, 2), torch.eye(4, 3), {}, r"got \(4, 2\) and \(4, 3\)"),
        (torch.eye(2, 2), torch.eye(4, 2), {}, "n and m of at least 3"),
        (torch.eye(4, 2), torch.eye(4, 2), {"block_rows": 3}, "leave 2 blocks of 4 rows, got 3"),
    ],
)
def test_kid_rejects(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        kid(x, y, **options)
