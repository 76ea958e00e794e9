"""Negative log-likelihood of test images under the base prior, the NCP and other priors."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.data import ImageDataset, Splits
from ncprior.figures import VAE_PRIOR, Figure, Figures
from ncprior.metrics.likelihood import Bounds, base_log_ratios, importance_weighted_bounds
from ncprior.metrics.normalizer import METHODS, estimate_log_z
from ncprior.nll_words import (
    METHOD_NAMES,
    chosen_method,
    density_said,
    log_z_figure,
    log_z_warnings,
    pixels_said,
    pixels_warnings,
    weights_said,
    weights_warnings,
)
from ncprior.numerics import LogZ, log_z, mean_and_se, stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.training.progress import progress_bar
from ncprior.walk import device_of, evaluating

TOGETHER = 50  # images
HIERARCHICAL_ROWS = 500  # at a time through a decoder of many layers


class NLL(NamedTuple):
    """Figures, what to be careful about, and the estimates of log Z behind them."""

    figures: Figures
    warnings: list[str]
    log_z: dict[str, LogZ]  # of the NCP, by method


def nll_figures(
    vae: Any,
    data: ImageDataset,
    splits: Splits,
    prior: NoiseContrastivePrior | None = None,
    **options: Any,
) -> Figures:
    """The figures of `measure_nll`, which takes the same arguments."""
    return measure_nll(vae, data, splits, prior, **options).figures


def measure_nll(
    vae: Any,
    data: ImageDataset,
    splits: Splits,
    prior: NoiseContrastivePrior | None = None,
    *,
    others: Mapping[str, Any] | None = None,
    images: int = 1000,
    importance_samples: int = 200,
    log_z_methods: Sequence[str] | None = None,
    log_z_draws: int = 2_000_000,
    log_z_chains: int = 1000,
    log_z_temperatures: int = 200,
    snis_proposals: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> NLL:
    """NLL of the first test images under each prior, from the same posterior draws.

    `nll_base` is that of the prior's base. `nll_ncp` has the estimated log Z in it and its error
    in its own: that of the base draws or, where their k-hat is above 0.7, that of bridge sampling;
    its note says which. `nll_snis` is a bound whatever Z is, for the density that picking one of K
    proposals samples. `nll_gain` is base less NCP, image by image. `bpd_*` are the same in bits per
    dimension (channels times pixels).

    If the base is not the VAE's own prior, that has `nll_vae_prior`, and the gains are over it,
    `nll_gain_base` among them; `nll_gain_over_base` is the NCP's over its base.

    Args:
        vae: The VAE.
        data: Its images; binarised dynamically, each test image is drawn once, by `seed`.
        splits: Which of them are for test.
        prior: A noise contrastive prior.
        others: Further priors under a flat VAE by name: densities with `log_prob`.
        images: Number of test images.
        importance_samples: Posterior draws per image; the NLL, an upper bound, falls with them.
        log_z_methods: Which of "base", "ais" and "bridge" to estimate log Z by; all three for a
            flat VAE by default, "base" for a hierarchical one.
        log_z_draws: Base draws for log Z.
        log_z_chains: Chains of annealed importance sampling.
        log_z_temperatures: Their temperatures.
        snis_proposals: K of the SNIS bound; 0 leaves it out.
        seed: Seed of the draws; those of the posterior do not depend on the priors.
        progress: Show progress bars.

    Raises:
        ValueError: a count that is too small, an unknown method, others under several latent
            groups, or an autoencoder.
    """
    check_has_likelihood(vae)
    if images < 2 or importance_samples < 1 or log_z_draws < 2:
        raise ValueError(
            "images and log_z_draws must be at least 2 and importance_samples at least 1, "
            f"got {images=}, {log_z_draws=}, {importance_samples=}"
        )
    if snis_proposals < 0 or snis_proposals == 1:
        raise ValueError(
            f"snis_proposals must be at least 2, or 0 for no such bound, got {snis_proposals}"
        )
    methods = tuple(log_z_methods or (METHODS if vae.num_groups == 1 else ("base",)))
    if unknown := set(methods) - set(METHODS):
        raise ValueError(
            f"log_z_methods must be of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}"
        )
    others, start = dict(others or {}), "base"  # of gains
    if prior is not None:
        own = getattr(vae, "prior", None)
        if prior.has_other_base(vae) and getattr(own, "normalized", False):
            others, start = others | {VAE_PRIOR: own}, VAE_PRIOR
        vae = prior.under(vae)
    rows = splits.test[:images]
    proposals = 0 if prior is None else snis_proposals
    with evaluating(vae):
        found = _bounds(
            vae,
            data,
            rows,
            prior,
            others,
            importance_samples,
            proposals,
            seed,
            progress,
        )
        estimates = {}
        if prior is not None:
            with progress_bar("log Z, %", 100, shown=progress) as bar:
                estimates = estimate_log_z(
                    vae,
                    prior,
                    methods,
                    draws=log_z_draws,
                    chains=log_z_chains,
                    temperatures=log_z_temperatures,
                    rows_at_once=8192 if vae.num_groups == 1 else HIERARCHICAL_ROWS,
                    seed=seed,
                    on_step=lambda done, total: bar(100 * done // total),
                )
    note = f"{importance_samples} importance samples, {pixels_said(data, found.binary, seed)}"
    if density := density_said(vae):
        note += f", {density}"
    table = _Table(len(rows), math.prod(data.image_shape), seed, note)
    warnings = pixels_warnings(vae, found.binary) + weights_warnings(found.k_hat)
    for name in dict.fromkeys((start, "base")):
        table.add(name, found.nll[name], 0.0, found.said(name))
    if prior is not None:
        chosen = chosen_method(estimates)
        z = estimates[chosen]
        said = f"{found.said('ncp')}, log Z by {METHOD_NAMES[chosen]}"
        nll = found.nll["ncp"] + z.value
        table.add("ncp", nll, z.se, said)
        table.add_gain("gain", found.nll[start] - nll, z.se)
        if start != "base":
            table.add_gain("gain_base", found.nll[start] - found.nll["base"], 0.0)
            table.add_gain("gain_over_base", found.nll["base"] - nll, z.se)
        if proposals:
            said = f"{found.said('snis')}, K = {proposals}, no log Z needed"
            table.add("snis", found.nll["snis"], found.pool_se, said)
        table.figures["nll_log_z"] = log_z_figure(z, seed, chosen)
        for method in methods:
            table.figures[f"log_z_{method}"] = log_z_figure(estimates[method], seed, method)
        warnings += log_z_warnings(estimates)
    for name in others:
        if name == start:
            continue
        table.add(name, found.nll[name], 0.0, found.said(name))
        table.add_gain(f"gain_{name}", found.nll[start] - found.nll[name], 0.0)
    return NLL(table.figures, warnings, estimates)


def check_has_likelihood(vae: Any) -> None:
    """Raise `ValueError` for an autoencoder, whose codes have no scale to weigh them by."""
    if getattr(vae, "deterministic", False):
        raise ValueError(
            "metrics must leave out nll for an autoencoder: its encoder is deterministic, and a "
            "likelihood would depend on the arbitrary code_scale; ask for --metrics fd,kid,prdc"
        )


class _Found(NamedTuple):
    """What the bounds say of all images."""

    nll: dict[str, Tensor]  # (n,) each, nats; of "ncp" without log Z
    ess: dict[str, Tensor]  # (n,), of the importance weights
    k_hat: dict[str, Tensor]  # (n,)
    pool_se: float  # what the shared pools of the SNIS bound add to its error
    binary: bool  # whether all pixels were 0 or 1

    def said(self, name: str) -> str:
        return weights_said(self.ess[name], self.k_hat[name])


def _bounds(
    vae: Any,
    data: ImageDataset,
    rows: Tensor,
    prior: NoiseContrastivePrior | None,
    others: dict[str, Any],
    samples: int,
    proposals: int,
    seed: int,
    progress: bool,
) -> _Found:
    device, flat = device_of(vae), vae.num_groups == 1
    pixels = stream(seed, "nll images") if data.redrawn else None
    generator = stream(seed, "nll", device=device)
    densities = {name: other.log_prob for name, other in others.items()}
    found: list[Bounds] = []
    pool_variance, binary, done = 0.0, True, 0
    with progress_bar("likelihood", len(rows), shown=progress) as bar:
        for i, part in enumerate(rows.split(TOGETHER)):
            x = data.batch(part, generator=pixels)
            binary = binary and bool(((x == 0) | (x == 1)).all())
            pool = None
            if proposals:
                of_pool = stream(seed, "nll proposals", i, device)
                pool = base_log_ratios(
                    vae,
                    prior,
                    proposals - 1,
                    generator=of_pool,
                    rows_at_once=8192 if flat else HIERARCHICAL_ROWS,
                )
                pool_variance += (len(part) / len(rows) * log_z(pool).se) ** 2
            found.append(
                importance_weighted_bounds(
                    vae,
                    x.to(device),
                    samples,
                    prior=prior,
                    pool=pool,
                    others=densities,
                    generator=generator,
                    rows_at_once=None if flat else HIERARCHICAL_ROWS,
                )
            )
            done += len(part)
            bar(done)

    def joined(field: str) -> dict[str, Tensor]:
        return {
            name: torch.cat([getattr(f.weights[name], field) for f in found]).cpu()
            for name in found[0].weights
        }

    nll = {name: -bound for name, bound in joined("log_mean").items()}
    return _Found(nll, joined("ess"), joined("k_hat"), math.sqrt(pool_variance), binary)


class _Table:
    """Figures that are added one prior at a time."""

    def __init__(self, images: int, dimensions: int, seed: int, note: str) -> None:
        self.figures: Figures = {}
        self.images, self.dimensions, self.seed, self.note = images, dimensions, seed, note

    def add(self, name: str, nll: Tensor, more_se: float, said: str) -> None:
        """nll_NAME and bpd_NAME; `more_se` is an error that all images share."""
        score = mean_and_se(nll)
        se, note = math.hypot(score.se, more_se), f"{self.note}, {said}"
        bits = math.log(2) * self.dimensions
        of = (self.images, self.seed)
        self.figures[f"nll_{name}"] = Figure(score.value, "nats", *of, se, note=note)
        self.figures[f"bpd_{name}"] = Figure(
            score.value / bits, "bits per dimension", *of, se / bits, note=note
        )

    def add_gain(self, name: str, gain: Tensor, more_se: float) -> None:
        score = mean_and_se(gain)
        se = math.hypot(score.se, more_se)
        self.figures[f"nll_{name}"] = Figure(
            score.value, "nats", self.images, self.seed, se, note=self.note
        )
