import math

import pytest
import torch

from ncprior.priors import Codes


def codes(n=40, size=3):
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(n, size, generator=generator, dtype=torch.float64)
    return Codes(loc, 0.1 + torch.rand(n, size, generator=generator, dtype=torch.float64))


def test_draws_are_those_of_q(rng):
    """Mean and variance of 4 standard errors; q is a mixture of all posteriors."""
    some, n = codes(), 40_000
    z = some.draw(n, generator=rng)
    mean = some.loc.mean(0)
    variance = some.loc.var(0, correction=0) + some.scale.square().mean(0)
    assert ((z.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    squares = (z - mean).square()
    assert ((squares.mean(0) - variance).abs() < 4 * squares.std(0) / math.sqrt(n)).all()
    found = some.moments()
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], variance.sqrt())


def test_each_keeps_the_order(rng):
    narrow = Codes(codes().loc, torch.full((40, 3), 1e-9, dtype=torch.float64))
    torch.testing.assert_close(narrow.each(generator=rng), narrow.loc)


def test_no_scale_is_no_noise(rng):
    loc = codes().loc
    still = Codes(loc, torch.zeros_like(loc))
    z = still.draw(100, generator=rng)
    assert (z[:, None] == loc).all(-1).any(1).all()


def test_split_is_a_partition():
    some = codes()
    rest, held = some.split(0.25, seed=1)
    assert len(rest.loc) == 30 and len(held.loc) == 10
    together = torch.cat([rest.loc, held.loc])
    assert torch.equal(together.sort(0).values, some.loc.sort(0).values)
    assert torch.equal(some.split(0.25, seed=1)[1].loc, held.loc)
    assert not torch.equal(some.split(0.25, seed=2)[1].loc, held.loc)
    pairs = {tuple(row.tolist()) for row in torch.cat([some.loc, some.scale], 1)}
    assert {tuple(row.tolist()) for row in torch.cat([held.loc, held.scale], 1)} <= pairs


@pytest.mark.parametrize("heldout", [0.0, 1.0, -0.1])
def test_split_needs_a_share(heldout):
    with pytest.raises(ValueError, match="heldout must be a share"):
        codes().split(heldout, seed=0)


@pytest.mark.parametrize(
    ("loc", "scale", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), r"two tensors \(n, d\)"),
        (torch.zeros(5), torch.zeros(5), r"two tensors \(n, d\)"),
        (torch.zeros(1, 2), torch.zeros(1, 2), "n of at least 2"),
        (torch.full((5, 2), math.nan), torch.zeros(5, 2), "must be finite"),
        (torch.zeros(5, 2), torch.full((5, 2), -0.1), "scales of at least 0"),
    ],
)
def test_codes_that_cannot_be_fitted(loc, scale, message):
    with pytest.raises(ValueError, match=message):
        Codes(loc, scale).checked()
