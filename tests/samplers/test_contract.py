"""What holds for every way of choosing latents, through `ncprior.draw`."""

import pytest
import torch
from toys import ExactFlat, TwoGroups, standard_normal

import ncprior
from ncprior.ratios import MLPRatio

WAYS = ["base", "reconstruction", "sir", "langevin", "annealed"]


class WithContext(torch.nn.Module):
    """A ratio of z2 given its context z1."""

    def __init__(self, ratio):
        super().__init__()
        self.ratio = ratio

    def forward(self, z, context=None):
        return self.ratio(z if context is None else z - 0.3 * context)


@pytest.fixture(params=["flat", "mixture", "two groups"])
def model(request):
    """A VAE and a noise contrastive prior with ratios that nobody fitted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if request.param == "two groups":
            ratios = [WithContext(MLPRatio(3, hidden=(8,))) for _ in range(2)]
            return TwoGroups(), ncprior.NoiseContrastivePrior(ratios).double()
        base = standard_normal(2)
        if request.param == "mixture":
            base = ncprior.GaussianMixture(2, 2).double()
            base.means.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]))
        return ExactFlat(), ncprior.NoiseContrastivePrior([MLPRatio(2)], base).double()


@pytest.fixture(params=WAYS)
def drawn(request, model):
    """num, options -> Draws, one way of drawing."""
    vae, prior = model
    options = {"proposals": 50, "steps": 20, "final_step_size": 0.01, "particles": 6}
    if request.param == "reconstruction":
        size = (5, 1, 1, getattr(vae, "size", 2))
        images = torch.rand(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        options["images"] = images
    elif request.param != "base":
        options["sampler"] = request.param
    chosen = prior if request.param in ("sir", "langevin", "annealed") else None
    return lambda num, **more: ncprior.draw(vae, chosen, num, **(options | more))


def same(a, b):
    """Equal but for the rounding of matrix products of another size."""
    torch.testing.assert_close(a.images, b.images, rtol=0, atol=1e-12)
    for x, y in zip(a.latents, b.latents, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(a.ess, b.ess, equal_nan=True)


def test_batch_size_changes_nothing(drawn):
    whole = drawn(7)
    for batch_size in (1, 3, 7, 100):
        same(drawn(7, batch_size=batch_size), whole)


def test_a_draw_does_not_depend_on_their_number(drawn):
    few, many = drawn(3), drawn(8, batch_size=5)
    torch.testing.assert_close(many.images[:3], few.images, rtol=0, atol=1e-12)


def test_chunk_changes_nothing(drawn):
    same(drawn(4, chunk=7), drawn(4))


def test_seed(drawn):
    same(drawn(3, seed=5), drawn(3, seed=5))
    assert not torch.equal(drawn(3, seed=5).latents[0], drawn(3, seed=6).latents[0])
    assert len(drawn(6).latents[0].unique(dim=0)) == 6  # no two draws are the same


def test_shapes(drawn, model):
    vae, _ = model
    found = drawn(4)
    assert found.images.shape == (4, 1, 1, found.latents[0].shape[1])
    assert len(found.latents) == vae.num_groups
    assert found.ess.shape == (vae.num_groups, 4)
    assert not found.images.requires_grad


def test_leaves_the_model_and_the_global_generator_as_they_were(drawn, model):
    vae, prior = model
    weights = {k: v.clone() for k, v in [*vae.state_dict().items(), *prior.state_dict().items()]}
    seeds = torch.get_rng_state()
    for training in (True, False):
        vae.train(training)
        drawn(2)
        assert vae.training is training
    assert torch.equal(torch.get_rng_state(), seeds)
    for name, tensor in [*vae.state_dict().items(), *prior.state_dict().items()]:
        assert torch.equal(tensor, weights[name])
