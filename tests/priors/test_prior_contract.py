"""What every prior keeps to, whatever it is made of. A new prior adds a line to CASES."""

import functools
import inspect
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from toys import gaussian_images, linear_vae

from ncprior import NoiseContrastivePrior, fit_prior, generate
from ncprior.priors import PRIORS, Codes, fit_density, load_density, save_density
from ncprior.priors.vamp import Components
from ncprior.ratios import MLPRatio


class Case(NamedTuple):
    """One prior under test.

    Attributes:
        name: Its name in PRIORS.
        settings: Arguments of `fit` that make it quick on 2000 codes of size 2.
        log_density: (prior, z) -> log-density, its own by default.
        bias: What its sampler may be off by, in total variation, beyond noise.
        points: Points of the grid along an axis; the rule is exact to 1e-3 with these.
        learns: Whether it must come nearer to q(z) than N(0, I).
        on_meta: Whether its density can be asked for where tensors have no values.
    """

    name: str
    settings: dict[str, Any] = {}  # noqa: RUF012
    log_density: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    bias: float = 0.0
    points: int = 241
    learns: bool = True
    on_meta: bool = True


def bound(prior, z):
    """Nearly the log-density: in two dimensions a bound of 64 draws has next to no gap."""
    generator = torch.Generator().manual_seed(0)
    return prior.log_prob_bound(z, num=64, generator=generator)


QUICK = {"steps": 300, "hidden": (32, 32), "learning_rate": 5e-3}
CASES = {
    "gaussian": Case("gaussian", learns=False),
    "mixture": Case("mixture", {"components": 5}),
    "vamp": Case("vamp", {"components": 30, "steps": 60}),
    "nsf": Case("flow", QUICK | {"family": "nsf", "transforms": 2}, on_meta=False),
    "realnvp": Case("flow", QUICK | {"family": "realnvp"}, on_meta=False),
    "maf": Case("flow", QUICK | {"family": "maf", "transforms": 2}),
    "autoregressive": Case("autoregressive", QUICK | {"components": 4}),
    "two-stage": Case("two-stage", QUICK | {"steps": 600}, bound, points=48, bias=0.02),
    "diffusion": Case(
        "diffusion", {"width": 32, "blocks": 1, "steps": 300, "learning_rate": 1e-2}, points=61
    ),
    "lars": Case("lars", QUICK | {"acceptance_draws": 1 << 20}),
    "snis": Case("snis", QUICK | {"proposals": 64}, bias=0.01),
    # Small Langevin steps, so that the run ends near the density.
    "ebm": Case("ebm", QUICK | {"steps": 60, "langevin_steps": 200, "step_size": 0.15}, bias=0.03),
}
FITTED: dict[str, Any] = {}  # each case is fitted once


@functools.cache
def images():
    return gaussian_images(2000, torch.Generator().manual_seed(3))


@functools.cache
def vae():
    with torch.random.fork_rng([]):
        return linear_vae()


def codes_of(case):
    """Codes along a parabola, away from the origin; for "vamp" those of its encoder."""
    if case.name == "vamp":
        return Codes(*vae().encode(images()))
    u = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    loc = torch.stack([0.8 * u + 0.5, 0.5 * u.square() - 1], 1)
    return Codes(loc, torch.full_like(loc, 0.3))


def fit(case):
    data = {"vae": vae(), "images": images()}
    return fit_density(case.name, codes_of(case), seed=0, **data, **case.settings)


@pytest.fixture(params=CASES)
def key(request):
    return request.param


@pytest.fixture
def case(key):
    return CASES[key]


@pytest.fixture
def prior(key, case):
    if key not in FITTED:
        FITTED[key] = fit(case)
    return FITTED[key]


def log_density(case, prior, z):
    if case.log_density is not None:
        return case.log_density(prior, z)
    return prior.log_prob(z) if prior.normalized else prior.unnormalized_log_prob(z)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Grid(NamedTuple):
    """A grid over the plane that holds all but next to nothing of the density."""

    cells: torch.Tensor  # (b, b) share of the density in each of b x b equal cells
    total: float  # the integral, for a normalised density
    low: torch.Tensor
    high: torch.Tensor


def on_grid(case, prior, cells=12):
    """Quadrature with the midpoint rule, in float64; `points` is cut to a multiple of `cells`."""
    draws = prior.sample((4000,), generator=seeded(9))
    centre, reach = draws.mean(0), 8 * draws.std(0)
    low, high = (centre - reach).double(), (centre + reach).double()
    per = case.points // cells
    steps = (torch.arange(per * cells, dtype=torch.float64) + 0.5) / (per * cells)
    axes = [a + (b - a) * steps for a, b in zip(low, high, strict=True)]
    z = torch.cartesian_prod(*axes)
    wide = copy_of(prior, torch.float64)
    values = torch.cat([log_density(case, wide, part) for part in z.split(20_000)]).detach()
    shift = 0.0 if prior.normalized or case.log_density else float(values.max())
    area = float((high - low).prod()) / (per * cells) ** 2
    mass = ((values - shift).exp() * area).view(cells, per, cells, per).sum((1, 3))
    return Grid(mass / mass.sum(), float(mass.sum()), low, high)


def copy_of(prior, dtype):
    other = type(prior)(**prior.config).to(dtype)
    other.load_state_dict(prior.state_dict())
    return other.eval()


def test_every_name_has_a_case():
    assert {case.name for case in CASES.values()} == set(PRIORS)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes(shape, case, prior):
    assert prior.batch_shape == () and prior.event_shape == (2,)
    z = prior.sample(shape, generator=seeded())
    assert z.shape == (*shape, 2) and z.dtype == torch.float32 and not z.requires_grad
    assert z.isfinite().all()
    values = log_density(case, prior, z)
    assert values.shape == shape and values.dtype == torch.float32 and values.isfinite().all()


def test_names_tell_whether_it_is_normalised(prior):
    assert hasattr(prior, "log_prob") == prior.normalized


def test_double_precision_agrees(case, prior):
    wide, z = copy_of(prior, torch.float64), prior.sample((50,), generator=seeded())
    values = log_density(case, wide, z.double())
    assert values.dtype == torch.float64
    assert wide.sample((5,), generator=seeded()).dtype == torch.float64
    if case.log_density is None:
        # A log-density is a sum of a dozen terms of size 10, each exact to 1e-6 of itself.
        torch.testing.assert_close(
            log_density(case, prior, z), values.float(), rtol=1e-3, atol=2e-3
        )


def test_gradient_in_z_is_that_of_differences(case, prior):
    wide = copy_of(prior, torch.float64)
    z = prior.sample((4,), generator=seeded()).double().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(case, wide, z).sum(), z)
    step = 1e-5 * torch.tensor([1.0, 0.0], dtype=torch.float64)
    ends = [log_density(case, wide, z.detach() + sign * step) for sign in (1, -1)]
    # Central differences err by h^2 / 6 of a third derivative, rounding by 1e-15 / h.
    torch.testing.assert_close(gradient[:, 0], (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-5)


def test_seeds(prior):
    before = torch.get_rng_state()
    first = prior.sample((7,), generator=seeded(5))
    assert torch.equal(first, prior.sample((7,), generator=seeded(5)))
    assert not torch.equal(first, prior.sample((7,), generator=seeded(6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_is_a_function_of_its_seed(case):
    """And draws nothing from the global state."""
    known = inspect.signature(PRIORS[case.name].fit).parameters
    quick = {name: n for name, n in (("steps", 3), ("acceptance_draws", 4096)) if name in known}
    case = case._replace(settings=case.settings | quick)
    before = torch.get_rng_state()
    one = fit(case)
    torch.rand(1)  # a fit that leaned on the global state would now differ
    other = fit(case)
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    torch.set_rng_state(before)
    fit(case)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_and_load(case, prior, tmp_path):
    save_density(prior, tmp_path)
    before = torch.get_rng_state()
    read = load_density(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(read) is type(prior) and read.config == prior.config
    assert not read.training and not any(p.requires_grad for p in read.parameters())
    z = prior.sample((9,), generator=seeded())
    assert torch.equal(read.sample((9,), generator=seeded()), z)
    assert torch.equal(log_density(case, read, z), log_density(case, prior, z))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_config_is_json_and_makes_the_same(case, prior):
    config = json.loads(json.dumps(prior.config))
    other = type(prior)(**config)
    other.load_state_dict(prior.state_dict())
    z = torch.zeros(3, 2)
    assert torch.equal(log_density(case, other.eval(), z), log_density(case, prior, z))


def test_every_tensor_moves(case, prior):
    """On the meta device a tensor that stayed behind is an error."""
    other = type(prior)(**prior.config).to("meta")
    tensors = [*other.parameters(), *other.buffers()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    if prior.normalized and case.on_meta:
        assert other.log_prob(torch.empty(4, 2, device="meta")).shape == (4,)


@pytest.mark.gpu
def test_on_an_accelerator(case, prior):
    if not torch.cuda.is_available():
        pytest.skip("no accelerator")
    other = copy_of(prior, torch.float32).to("cuda")
    z = prior.sample((200,), generator=seeded())
    if case.log_density is None:
        found = log_density(case, other, z.cuda()).cpu()
        torch.testing.assert_close(found, log_density(case, prior, z), rtol=1e-3, atol=2e-3)
    draws = other.sample((3,), generator=torch.Generator("cuda").manual_seed(0))
    assert draws.device.type == "cuda" and draws.isfinite().all()


def test_density_integrates_to_one_and_samples_follow_it(key, case, prior):
    """Total variation between counts in cells and their shares on the grid.

    Its mean is below sum sqrt(p (1 - p) / n) / 2, and by McDiarmid's inequality it exceeds its mean
    by more than t in exp(-2 n t^2) of all runs: t = sqrt(7 / n) is one run in a million.
    """
    grid, n = on_grid(case, prior), 20_000
    if prior.normalized:  # 8 standard deviations hold all but the far tails
        assert grid.total == pytest.approx(1, abs=2e-3)
    z = prior.sample((n,), generator=seeded(2)).double()
    index = ((z - grid.low) / (grid.high - grid.low) * len(grid.cells)).long()
    inside = ((index >= 0) & (index < len(grid.cells))).all(1)
    flat = index[inside] @ torch.tensor([len(grid.cells), 1])
    shares = torch.bincount(flat, minlength=grid.cells.numel()).view(grid.cells.shape) / n
    distance = 0.5 * float((shares - grid.cells).abs().sum())
    expected = 0.5 * float((grid.cells * (1 - grid.cells) / n).sqrt().sum())
    assert distance < expected + math.sqrt(7 / n) + case.bias


def test_fit_brings_it_near_the_codes(case, prior):
    """KL(q || prior) on fresh draws, q(z) being the mixture of all posteriors."""
    codes = codes_of(case)
    n = len(codes.loc)
    q = Components(torch.full((n,), -math.log(n)), codes.loc, codes.scale)
    z = codes.draw(2000, generator=seeded(4))

    def gap(density):
        return float((q.log_prob(z) - density).detach().mean())

    if not (prior.normalized or case.log_density):
        pytest.skip("its normalising constant is not known")
    plain = gap(torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1))
    found = gap(log_density(case, prior, z))
    assert found < (0.5 * plain if case.learns else 1.01 * plain)


def test_temperatures(prior):
    assert prior.tempered(1.0) is prior or prior.event_shape == (2,)
    try:
        cold = prior.tempered(0.3)
    except ValueError as error:
        assert "temperature" in str(error)
        return
    z = cold.sample((2000,), generator=seeded())
    assert z.shape == (2000, 2)
    assert z.std(0).prod() < prior.sample((2000,), generator=seeded()).std(0).prod()


def test_ncp_on_top(case, prior):
    """Fitting and drawing by importance resampling on this base; the base is not changed."""
    before = {name: value.clone() for name, value in prior.state_dict().items()}
    ncp = fit_prior(
        vae(),
        images()[:400],
        base=prior,
        network="mlp",
        network_options={"members": 1, "hidden": (8,)},
        steps=5,
        batch_size=64,
        log_z_draws=500,
        progress=False,
        tensorboard=False,
        device="cpu",
    )
    pictures = generate(vae(), ncp, num=3, proposals=8, seed=0)
    assert pictures.shape == (3, 1, 1, 2) and pictures.isfinite().all()
    for name, value in prior.state_dict().items():
        assert torch.equal(value, before[name])


def test_ncp_is_saved_with_its_base(prior, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ncp = NoiseContrastivePrior([MLPRatio(2)], prior).eval()
    ncp.save_pretrained(tmp_path)
    read = NoiseContrastivePrior.from_pretrained(tmp_path)
    assert type(read.base) is type(prior)
    z = prior.sample((5,), generator=seeded())
    assert torch.equal(read.base.sample((5,), generator=seeded()), z)
    assert torch.equal(read.log_ratio(0, z), ncp.log_ratio(0, z))


def test_unknown_name():
    with pytest.raises(ValueError, match="name must be one of gaussian, mixture"):
        fit_density("gausian", codes_of(CASES["gaussian"]))
