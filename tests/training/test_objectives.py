"""Autoencoders: their objectives against direct sums, and what comes out of training by them."""

import pytest
import torch
from toys import Reshape, gaussian_images

import ncprior
from ncprior.evaluation import evaluate
from ncprior.nll_figures import measure_nll
from ncprior.priors import Codes, GaussianMixture
from ncprior.training.evidence import encode
from ncprior.training.objectives import (
    OBJECTIVES,
    SCALES,
    Autoencoding,
    gradient_penalty,
    imq_mmd,
    sum_of_squares,
)

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}


def autoencoder(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"preset": "digits", "posterior_scale": "deterministic"} | options
        return ncprior.build_vae((1, 8, 8), **options)


def linear_autoencoder():
    """Two pixels, two codes, one linear layer each way."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
        options = {"latent_size": 2, "posterior_scale": "deterministic"}
        vae = ncprior.FlatVAE(encoder, Reshape(), ncprior.Gaussian(0.1), **options)
    return vae


def test_imq_mmd_is_the_double_loop(rng):
    """The U-statistic written out, pair by pair and scale by scale."""
    n, d = 7, 3
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    y = 0.5 + torch.randn(n, d, generator=rng, dtype=torch.float64)

    def kernel(a, b):
        squared = sum((u - v) ** 2 for u, v in zip(a.tolist(), b.tolist(), strict=True))
        return sum(2 * d * s / (2 * d * s + squared) for s in SCALES)

    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j)
    across = sum(kernel(x[i], y[j]) for i, j in pairs)
    expected = within / (n * (n - 1)) - 2 * across / n**2
    assert float(imq_mmd(x, y)) == pytest.approx(expected, rel=1e-12)


def test_imq_mmd_of_equal_laws_is_zero_on_average(rng):
    """Unbiased: the mean over many pairs of samples is within 4 of its standard errors of 0."""
    x, y = torch.randn(2, 400, 10, 2, generator=rng, dtype=torch.float64)
    found = torch.stack([imq_mmd(a, b) for a, b in zip(x, y, strict=True)])
    assert abs(found.mean()) < 4 * found.std() / 400**0.5
    shifted = torch.stack([imq_mmd(a, b + 1) for a, b in zip(x, y, strict=True)])
    assert shifted.mean() > 8 * shifted.std() / 400**0.5


def test_imq_mmd_refuses_what_has_no_pairs():
    with pytest.raises(ValueError, match=r"n of at least 2, got \(1, 2\) and \(1, 2\)"):
        imq_mmd(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(4, 2\)"):
        imq_mmd(torch.zeros(3, 2), torch.zeros(4, 2))


def test_gradient_penalty_of_a_linear_decoder(rng):
    """|W|_F^2 / D whatever z is. A draw has variance at most 2 |W W^T|_F^2 / D^2 (signs)."""
    n, d, values = 20_000, 3, 4
    weight = torch.randn(values, d, generator=rng, dtype=torch.float64, requires_grad=True)
    z = torch.randn(n, d, generator=rng, dtype=torch.float64, requires_grad=True)
    found = gradient_penalty(z @ weight.T, z, generator=rng)
    exact = weight.square().sum() / values
    gram = (weight @ weight.T).detach()
    error = 4 * float((2 * gram.square().sum()).sqrt()) / values / n**0.5
    assert float((found - exact).detach()) == pytest.approx(0, abs=error)
    (slope,) = torch.autograd.grad(found, weight)  # it can be a loss
    torch.testing.assert_close(slope, 2 * weight.detach() / values, atol=0.1, rtol=0.1)


def test_gradient_penalty_of_one_value_is_exact(rng):
    """With one output the sign drops out: the mean of (2 a z)^2 for x = a z^2."""
    z = torch.randn(5, 1, generator=rng, dtype=torch.float64, requires_grad=True)
    found = gradient_penalty(3 * z**2, z, generator=rng)
    assert float(found.detach()) == pytest.approx(float((6 * z).square().mean().detach()))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_the_sum_of_its_parts(objective, rng):
    """Each part computed here from the codes and the decoder."""
    vae, images = linear_autoencoder(), gaussian_images(6, rng)
    decoder = None if OBJECTIVES[objective].decoder is None else 0.25
    model = Autoencoding(vae, objective, latent_weight=0.5, decoder_weight=decoder)
    state = rng.get_state()
    loss, figures = model(images, rng, 0.5)
    rng.set_state(state)
    z = vae.encoder(images)
    error = (vae.decoder(z) - images).square().mean()
    if objective == "wae-mmd":
        draws = torch.randn(6, 2, generator=rng)
        latent = imq_mmd(z, draws)
    else:
        latent = z.square().mean()
    expected = error + 0.5 * 0.5 * latent
    if objective == "rae-l2":
        expected = expected + 0.25 * vae.decoder.layer.weight.square().sum()
    if objective == "rae-gp":  # W is a multiple of the identity here: no error by the signs
        expected = expected + 0.25 * vae.decoder.layer.weight.square().sum() / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(figures["error"], error)
    model.eval()
    with torch.no_grad():  # as on validation images
        torch.testing.assert_close(model(images, rng)[1]["error"], error)


def test_biases_are_free():
    decoder = torch.nn.Linear(2, 3)
    torch.testing.assert_close(sum_of_squares(decoder), decoder.weight.square().sum())
    with pytest.raises(ValueError, match="decoder must have weights"):
        sum_of_squares(torch.nn.Identity())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "rae"}, "one of elbo, wae-mmd, rae-l2, rae-gp, rae-sn, got 'rae'"),
        ({}, "elbo needs posteriors with a scale, this encoder is deterministic"),
        ({"objective": "rae-sn", "decoder_weight": 1.0}, "decoder_weight is nothing that"),
        ({"objective": "rae-l2", "latent_weight": -1.0}, "latent_weight must be finite and at"),
        ({"objective": "rae-gp", "decoder_weight": float("nan")}, "decoder_weight must be finite"),
        ({"objective": "wae-mmd", "kl_weight": 0.5}, "kl_weight, kl_balance and norm_penalty"),
        ({"objective": "wae-mmd", "norm_penalty": 0.5}, "leave them out for wae-mmd"),
    ],
)
def test_settings_that_cannot_work(options, message, digits):
    vae = autoencoder()
    before = [p.clone() for p in vae.parameters()]
    with pytest.raises(ValueError, match=message):
        ncprior.train_vae(vae, *digits, **options, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


def test_encoders_of_the_other_kind(digits):
    vae = autoencoder(posterior_scale="softplus")
    with pytest.raises(ValueError, match='posterior_scale = "deterministic"'):
        ncprior.train_vae(vae, *digits, objective="rae-l2", **QUIET)
    with pytest.raises(ValueError, match="latent_weight is nothing that objective elbo has"):
        ncprior.train_vae(vae, *digits, latent_weight=1.0, **QUIET)


TRAINED = {"steps": 60, "batch_size": 64, "learning_rate": 2e-3, "evaluate_every": 20}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_error_falls_on_digits(objective, digits):
    """By more than half of what predicting a constant costs, on images that were never seen."""
    data, splits = digits
    vae = autoencoder(image_mean=data.raw(splits.train).mean(0))
    history = ncprior.train_vae(vae, data, splits, objective=objective, **TRAINED, **QUIET)
    found = [row["validation_error"] for row in history]
    assert found[-1] < found[0]
    images = data.batch(splits.validation)
    constant = (images - data.raw(splits.train).mean(0)).square().mean()
    if objective != "rae-sn":  # with slopes of at most 1 it takes longer
        assert found[-1] < 0.5 * constant
    assert not vae.training


def test_wae_brings_codes_to_the_prior(digits):
    """Their mean square is far nearer to 1 than that of a regularised autoencoder."""
    data, splits = digits
    found = {}
    for objective in ("wae-mmd", "rae-l2"):
        vae = autoencoder()
        options = {"latent_weight": 0.1} | TRAINED
        ncprior.train_vae(vae, data, splits, objective=objective, **options, **QUIET)
        codes, _ = vae.encode(data.batch(splits.validation))
        found[objective] = float(codes.square().mean().detach())
    assert found["wae-mmd"] == pytest.approx(1, abs=0.3) and found["rae-l2"] < 0.3


def test_resumed_training_ends_alike(digits, tmp_path):
    """With spectral norms, whose vectors are part of what is kept."""
    options = {"objective": "rae-sn", "steps": 8, "batch_size": 16, "checkpoint_every": 3}
    expected, found = autoencoder(), autoencoder()
    ncprior.train_vae(expected, *digits, **options, **QUIET)
    ncprior.train_vae(autoencoder(), *digits, directory=tmp_path, **options, **QUIET)
    ncprior.train_vae(found, *digits, directory=tmp_path, resume=True, **options, **QUIET)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="objective was rae-sn, now it is rae-l2"):
        other = options | {"objective": "rae-l2"}
        ncprior.train_vae(autoencoder(), *digits, directory=tmp_path, resume=True, **other, **QUIET)


def test_ex_post_density_end_to_end(digits):
    """Train, fit a mixture to the codes, and draw: nearer to the images than draws of N(0, I)."""
    data, splits = digits
    vae = autoencoder(image_mean=data.raw(splits.train).mean(0))
    options = TRAINED | {"steps": 200}
    ncprior.train_vae(vae, data, splits, objective="rae-l2", **options, **QUIET)
    codes = Codes(*encode(vae, data, splits.train))
    mixture = GaussianMixture.fit(codes)
    scores = evaluate(vae, None, data, splits, priors={"mixture": mixture}, metrics=("fd",),
                      samples=500)  # fmt: skip
    assert 0 < scores["fd_reconstruction"].value < scores["fd_base"].value
    assert scores["fd_mixture"].value < 0.7 * scores["fd_base"].value
    for measure in (
        lambda: evaluate(vae, None, data, splits, metrics=("nll",)),
        lambda: measure_nll(vae, data, splits),
    ):
        with pytest.raises(ValueError, match="must leave out nll for an autoencoder"):
            measure()
