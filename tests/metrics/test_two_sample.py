import math

import pytest
import torch

from ncprior.metrics.kernel import median_bandwidth
from ncprior.metrics.two_sample import SCALES, kernel_test, mmd_test


def normal(n, rng, size=2, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, size, generator=rng, dtype=torch.float64)


def gaussian(a, b, s):
    return math.exp(-float((a - b).square().sum()) / (2 * s**2))


def mean_over(a, b, s, skip):
    """Mean kernel over pairs of rows, those on the diagonal left out where `skip`."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
    return sum(gaussian(a[i], b[j], s) for i, j in pairs) / len(pairs)


def direct(x, y, s, paired=False):
    """Unbiased MMD^2, pair by pair."""
    within = mean_over(x, x, s, True) + mean_over(y, y, s, True)
    return within - 2 * mean_over(x, y, s, paired)


@pytest.mark.parametrize("paired", [False, True])
def test_values_are_sums_over_pairs(rng, paired):
    """Far from 0 and in float32 too; unequal numbers of rows where there are no pairs."""
    x, y = normal(13, rng, shift=30.0), normal(13 if paired else 9, rng, shift=30.5)
    widths = [0.5, 2.0]
    found = mmd_test(x, y, bandwidths=widths, paired=paired, generator=rng)
    expected = [direct(x, y, s, paired) for s in widths]
    assert found.of_kernels == pytest.approx(expected, rel=1e-9)
    assert found.value == pytest.approx(sum(expected) / 2, rel=1e-9)
    single = mmd_test(x.float(), y.float(), bandwidths=widths, paired=paired, generator=rng)
    assert single.value == pytest.approx(found.value, abs=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_error_is_the_delete_one_jackknife(rng, paired):
    x, y = normal(8, rng), normal(8 if paired else 6, rng, shift=1.0)

    def without(rows, i):
        return torch.cat([rows[:i], rows[i + 1 :]])

    def value(x, y):
        return sum(direct(x, y, s, paired) for s in (0.7, 1.5)) / 2

    if paired:
        left_out = [[value(without(x, i), without(y, i)) for i in range(8)]]
    else:
        left_out = [
            [value(without(x, i), y) for i in range(8)],
            [value(x, without(y, i)) for i in range(6)],
        ]
    variance = sum((len(v) - 1) * float(torch.tensor(v).var(correction=0)) for v in left_out)
    found = mmd_test(x, y, bandwidths=[0.7, 1.5], paired=paired, generator=rng)
    assert found.se == pytest.approx(math.sqrt(variance), rel=1e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_p_value_counts_exchanges_one_by_one(paired):
    """All labels of four rows or four pairs, each by computing MMD^2 anew, give the same p-value.

    With one kernel the largest standardised value is that of the kernel. Many random labels of few
    rows meet all, so that the p-value tends to the share of them that are as extreme: 4 standard
    errors of 4000 draws.
    """
    rng = torch.Generator().manual_seed(3)
    x, y = normal(4, rng), normal(4, rng, shift=0.8)
    pooled = torch.cat([x, y])
    if paired:
        ways = [[(i >> j) & 1 for j in range(4)] for i in range(16)]
        ways = [[j + 4 * w[j] for j in range(4)] for w in ways]
    else:
        ways = [[j for j in range(8) if (i >> j) & 1] for i in range(256) if i.bit_count() == 4]
    values = []
    for way in ways:
        rest = [(j + 4) % 8 for j in way] if paired else [j for j in range(8) if j not in way]
        values.append(direct(pooled[way], pooled[rest], 1.0, paired))
    share = sum(v >= direct(x, y, 1.0, paired) - 1e-9 for v in values) / len(values)
    assert 0.05 < share < 0.8
    found = mmd_test(x, y, bandwidths=[1.0], permutations=4000, paired=paired, generator=rng)
    assert abs(found.p_value - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 1 / 4001


def polynomial(pooled):
    """The kernel of KID."""
    return (pooled @ pooled.T / pooled.shape[1] + 1) ** 3


def rejections(test, runs=200, level=0.1):
    return sum(test().p_value <= level + 1e-12 for _ in range(runs)) / runs


def as_often_as_said(share, runs=200, level=0.1):
    """19 permutations give p-values of multiples of 1/20, so that the level is exact.

    4 standard errors of a share of 200.
    """
    return abs(share - level) < 4 * math.sqrt(level * (1 - level) / runs)


def test_false_positives_of_mmd(rng):
    def test():
        return mmd_test(normal(25, rng), normal(15, rng), permutations=19, generator=rng)

    assert as_often_as_said(rejections(test))


def test_false_positives_of_pairs_that_share_something(rng):
    """Rows of x and y have a large part in common. Pairs are exchanged, so the level holds."""

    def test():
        common = normal(25, rng, scale=2.0)
        x, y = common + normal(25, rng), common + normal(25, rng)
        return mmd_test(x, y, permutations=19, paired=True, generator=rng)

    assert as_often_as_said(rejections(test))


def test_false_positives_of_the_kernel_of_kid(rng):
    def test():
        pooled = normal(40, rng, size=4)
        return kernel_test([polynomial(pooled)], 25, permutations=19, generator=rng)

    assert as_often_as_said(rejections(test))


def test_sees_differences_of_every_size(rng):
    """A shift needs a wide kernel, stripes at a distance of 1 a narrow one: the test sees both."""
    x = normal(200, rng, size=1)
    shifted = normal(200, rng, size=1, shift=0.5)
    striped = normal(200, rng, size=1).round()
    median = median_bandwidth(x, striped)
    for y in (shifted, striped):
        found = mmd_test(x, y, permutations=200, generator=rng)
        assert found.p_value == 1 / 201
    wide = mmd_test(x, striped, bandwidths=[4 * median], permutations=200, generator=rng)
    assert wide.p_value > 0.05


def test_pairs_give_power_where_they_share_much(rng):
    common = normal(80, rng, scale=3.0)
    x, y = common + normal(80, rng), common + normal(80, rng, shift=0.7)
    options = {"permutations": 200, "generator": rng}
    assert mmd_test(x, y, paired=True, **options).p_value < 0.02
    assert mmd_test(x, y, **options).p_value > 0.05


def test_closed_form_of_gaussians(rng):
    """MMD^2 of N(0, I) and N(0.6, I) in 3 dimensions, the mean over two widths."""
    found = mmd_test(
        normal(1200, rng, 3), normal(900, rng, 3, shift=0.6), bandwidths=[1.0, 2.0],
        permutations=20, generator=rng,
    )  # fmt: skip
    expected = 0.0
    for s in (1.0, 2.0):
        wide = s**2 + 2
        expected += (s**2 / wide) ** 1.5 * (1 - math.exp(-3 * 0.6**2 / (2 * wide)))
    assert abs(found.value - expected) < 4 * found.se
    assert expected > 10 * found.se and found.p_value == 1 / 21


def test_the_same_rows_are_no_evidence(rng):
    x = normal(10, rng)
    found = mmd_test(x, x, paired=True, permutations=99, generator=rng)
    assert found.p_value == 1 and found.value == pytest.approx(0, abs=1e-12)


def test_default_widths_are_around_the_median(rng):
    x, y = normal(30, rng), normal(20, rng)
    widths = [scale * median_bandwidth(x, y) for scale in SCALES]
    given = mmd_test(x, y, bandwidths=widths, generator=torch.Generator().manual_seed(1))
    assert mmd_test(x, y, generator=torch.Generator().manual_seed(1)) == given


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4, 3), {}, r"\(4, 2\) and \(4, 3\)"),
        (torch.zeros(2, 2), torch.zeros(4, 2), {}, "at least 3 rows"),
        (torch.full((4, 1), math.nan), torch.zeros(4, 1), {}, "finite"),
        (torch.rand(4, 1), torch.rand(4, 1), {"bandwidths": [1.0, 0.0]}, "bandwidths must be"),
        (torch.rand(4, 1), torch.rand(4, 1), {"bandwidths": []}, "bandwidths must be"),
        (torch.rand(4, 1), torch.rand(4, 1), {"permutations": 0}, "permutations must be"),
        (torch.rand(4, 1), torch.rand(5, 1), {"paired": True}, "as many rows of x as of y"),
    ],
)
def test_rejects_what_cannot_be_compared(rng, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        mmd_test(x, y, **options, generator=rng)


def test_rejects_no_kernel(rng):
    with pytest.raises(ValueError, match="at least one matrix"):
        kernel_test([], 3, generator=rng)
