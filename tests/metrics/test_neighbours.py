import math

import pytest
import torch

from ncprior.metrics import memorised, nearest
from ncprior.metrics import neighbours as module
from ncprior.metrics.neighbours import as_compared


@pytest.mark.parametrize("chunk", [1 << 24, 500])
def test_nearest_is_that_of_an_exhaustive_search(chunk, rng, monkeypatch):
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", chunk)
    x = torch.rand(30, 12, generator=rng)
    y = torch.rand(200, 12, generator=rng)
    expected = torch.cdist(x.double(), y.double()).topk(4, largest=False)
    found = nearest(x, y, 4)
    torch.testing.assert_close(found.distance, expected.values)
    assert torch.equal(found.row, expected.indices)


def test_nearest_where_single_precision_is_not_enough(rng):
    """All references but one lie within 1e-7 of each other, far from the queries.

    Their squared distances of about 300 differ by less than rounding in single precision, so the
    candidates are picked at random, and only the second search can be right.
    """
    near = 10 + 1e-7 * torch.rand(300, 3, generator=rng, dtype=torch.float64)
    y = torch.cat([near, torch.tensor([[-500.0, 0, 0]], dtype=torch.float64)])
    x = torch.rand(20, 3, generator=rng, dtype=torch.float64)
    expected = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
    found = nearest(x, y, 2)
    assert torch.equal(found.row, expected.indices)
    torch.testing.assert_close(found.distance, expected.values, rtol=1e-12, atol=0)


def test_a_reference_finds_itself(rng):
    y = torch.rand(50, 7, generator=rng)
    found = nearest(y[[4, 2]], y)
    assert found.row.flatten().tolist() == [4, 2] and found.distance.flatten().tolist() == [0, 0]
    assert nearest(y[:1], y, 50).row.unique().numel() == 50


@pytest.mark.parametrize(
    ("x", "y", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, r"\(2, 3\) and \(4, 2\)"),
        (torch.zeros(2, 3), torch.full((4, 3), math.nan), 1, "must be finite"),
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, "k must be between 1 and 4, got 5"),
    ],
)
def test_nearest_rejects(x, y, k, message):
    with pytest.raises(ValueError, match=message):
        nearest(x, y, k)


def test_as_compared():
    """Small images are left alone; of large ones the middle of a 64 by 64 picture is taken."""
    small = torch.rand(3, 1, 28, 30)
    assert torch.equal(as_compared(small), small.flatten(1))
    large = torch.zeros(2, 3, 128, 192)
    large[0, :, 24:104, 36:156] = 1  # exactly the middle 40 of 64 in both directions
    large[1] = 1 - large[0]
    assert torch.equal(as_compared(large), torch.tensor([[1.0], [0.0]]).expand(2, 3 * 40 * 40))
    assert as_compared(torch.rand(2, 1, 64, 64)).shape == (2, 1600)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0 to 255"):
        as_compared(torch.tensor([0.0, 255]).view(1, 1, 1, 2))


def images(n, rng):
    return torch.randn(n, 6, generator=rng, dtype=torch.float64)


def test_fresh_samples_are_not_memorised(rng):
    """Samples of the same law: 5 % are near and half are closer, within the errors said."""
    found = [memorised(images(100, rng), images(600, rng), images(300, rng)) for _ in range(60)]
    for name, truth in (("near", 0.05), ("closer_to_train", 0.5)):
        values = torch.tensor([getattr(f, name).value for f in found], dtype=torch.float64)
        said = torch.tensor([getattr(f, name).se for f in found], dtype=torch.float64)
        # The 5 % quantile of 300 distances is biased by at most 1 / 300.
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(60) + 0.0034
        # 60 runs know the spread to 9 %. Of 300 runs the ratios are 1.0 and 1.25.
        ratio = said.square().mean().sqrt() / values.std()
        assert 1 - 4 * 0.09 < ratio < 1.25 * (1 + 4 * 0.09)


def test_copies_are_seen(rng):
    """A fifth of the samples are training images with a little noise on them."""
    train, heldout = images(600, rng), images(300, rng)
    copies = train[:60] + 0.01 * images(60, rng)
    found = memorised(torch.cat([copies, images(240, rng)]), train, heldout)
    assert found.near.value > 0.05 + 4 * found.near.se
    # Half of the training images are looked at, at even steps: 0.5 + 0.2 / 2 * 0.5.
    assert found.near.value == pytest.approx(0.2 + 0.8 * 0.05, abs=4 * found.near.se)
    assert found.closer_to_train.value == pytest.approx(0.55, abs=4 * 0.033)
    everything = memorised(train[:200] + 0, train, heldout)
    assert everything.near.value == 1 and everything.closer_to_train.value > 0.6


def test_smooth_samples_are_near_but_no_closer_to_train(rng):
    """A third of the deviation from the mean: nearer to every image, of either kind."""
    samples, train, heldout = 0.3 * images(300, rng), images(1200, rng), images(600, rng)
    found = memorised(samples, train, heldout)
    assert found.near.value > 0.05 + 4 * found.near.se
    assert abs(found.closer_to_train.value - 0.5) < 4 * found.closer_to_train.se


def test_known_distances_of_heldout_images_change_nothing(rng):
    samples, train, heldout = images(50, rng), images(100, rng), images(40, rng)
    typical = nearest(heldout, train).distance[:, 0]
    assert memorised(samples, train, heldout, typical=typical) == memorised(samples, train, heldout)
    far = memorised(samples, train, heldout, typical=0 * typical)
    assert far.near.value == 0 and far.near.se > 0  # none of 50 is not certainly none
    with pytest.raises(ValueError, match=r"typical must have the shape \(40,\), got \(50,\)"):
        memorised(samples, train, heldout, typical=torch.zeros(50))


def test_memorised_rejects(rng):
    with pytest.raises(ValueError, match="held-out images between 20 and"):
        memorised(images(10, rng), images(50, rng), images(51, rng))
