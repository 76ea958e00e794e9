"""Priors of one frozen VAE, combined into one: a weighted mean, normalised anew.

With priors p_i and the VAE's own p, log p + sum_i w_i (log p_i - log p) - c, their geometric mean,
is an exponential family in w, so that E_q[log density], which the ELBO gains from, is concave in w:
one maximum. So it is of log sum_i w_i p_i, their arithmetic mean.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ncprior.data import ImageDataset, as_dataset
from ncprior.metrics import base_log_ratios
from ncprior.numerics import LogZ, log_mean_exp, log_z, mean_and_se, stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.priors.contrastive import identity
from ncprior.ratios import CombinedRatio, UnitRatio
from ncprior.ratios.combined import MEANS
from ncprior.storage import fingerprint, pack_rows, unpack_rows
from ncprior.training.heldout import HeldOut
from ncprior.training.processes import make_fabric
from ncprior.training.progress import Bar, progress_bar
from ncprior.training.ratio_job import log_ratios
from ncprior.training.verdict import calibrate_and_judge
from ncprior.walk import evaluating

DRAWS = 100_000  # of the base, for the normaliser while the weights are found
LOG_Z_DRAWS = 200_000  # other draws, for log Z
MOST = 2.0  # weight of one prior
ROUNDS = 5000  # of expectation maximisation, at most
LEAST_SHARE = 1e-3
AT_ONCE = 4096


class _Part(NamedTuple):
    """A prior as log r + log b, with its log Z where that is known."""

    ratio: nn.Module
    base: Any
    log_z: float | None


def combine(
    vae: Any,
    priors: Sequence[Any],
    data: ImageDataset | Tensor,
    *,
    rows: Tensor | None = None,
    names: Sequence[str] | None = None,
    mean: str = "arithmetic",
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> NoiseContrastivePrior:
    """A weighted mean of priors of one frozen VAE, as a noise contrastive prior.

    The arithmetic mean is their mixture: likelihood has gained by it, and the variety of samples is
    kept. The geometric mean is concentrated where the priors agree: it has gained as much or a
    little more likelihood, and precision, while variety (recall, Frechet distance) has lost.

    Its weights, none below 0, are those of the best ELBO on `rows`. What they lack of 1 in the
    geometric mean is the weight of the VAE's own prior, a negative one if they are more. Its base
    is the density among the priors and their bases that posterior draws of `rows` like best: from a
    good one SIR needs few proposals. A part of an arithmetic mean that goes far beyond that base is
    cut off there, and log Z, which should be near 0, too low by what is missing.

    Args:
        vae: The VAE that all of them were fitted on; one latent group, flat latents.
        priors: At least two, each a `NoiseContrastivePrior` with a density as its base, or a
            density (mixture, flow, ...), not normalised where it need not be.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        rows: Rows that no prior was fitted on, such as validation images; all by default.
        names: What to call the priors in the record.
        mean: "arithmetic" or "geometric".
        seed: Seed of all draws.
        device: "auto", "cpu", "cuda" or "mps".
        progress: Show a progress bar.

    Returns:
        The prior. `record["combined"]` says the weight of each part and what it wins alone over
        the VAE's prior, E_q[log p_i - log p] in nats; `record["bound"]` what the whole wins, and
        `record["gain"]` by how much that is more than the best part; with errors over images.

    Raises:
        ValueError: another mean, fewer than two priors, a prior of another VAE or without a
            density, before anything is drawn.
    """
    if mean not in MEANS:
        raise ValueError(f"mean must be one of {', '.join(MEANS)}, got {mean!r}")
    parts = _parts(vae, priors)
    names = list(names or (f"prior {i + 1}" for i in range(len(priors))))
    if len(names) != len(priors):
        raise ValueError(f"names must be {len(priors)}, one for each prior, got {len(names)}")
    data = as_dataset(data)
    rows = torch.arange(len(data)) if rows is None else rows
    if len(rows) < 2:
        raise ValueError(f"rows must name at least 2 images that no prior saw, got {len(rows)}")
    device_ = make_fabric(device, "32-true", alone=True).device
    own = vae.to(device_).prior
    for part in parts:
        part.ratio.to(device_)
        part.base.to(device_)
    total = DRAWS + LOG_Z_DRAWS
    with evaluating(vae), progress_bar("combining priors", total, shown=progress) as bar:
        held = HeldOut(vae, data, rows, [0], seed=seed, device=device_)
        at_q = torch.cat([pairs[0].posterior for pairs in held])
        base = _best_base([own, *(part.base for part in parts)], at_q)
        all_parts = [*parts, _part(UnitRatio(), own, None)]
        ratio = _ratio(all_parts, base, mean).to(at_q)
        there = _in_pieces(ratio.each, at_q)
        draws = base.sample((DRAWS,), generator=stream(seed, "combining", device=device_))
        here = _in_pieces(ratio.each, draws, bar)
        z = _log_zs(all_parts, here)
        if mean == "geometric":
            weights, c = best_weights(there.mean(0), here)
            offsets = torch.full_like(weights, c)
        else:
            shares = best_shares((there - z)[:, :-1])
            weights, offsets = torch.cat([shares, shares.new_zeros(1)]), z
        used = weights.nonzero().flatten()  # what has no weight would only take time
        ratio = _ratio([all_parts[i] for i in used], base, mean).to(at_q)
        ratio.weights.copy_(weights[used])
        ratio.offsets.copy_(offsets[used])
        each = torch.cat([(there - z)[:, :-1], ratio.mean_of(there[:, used])[:, None]], 1)
        bounds = [_bound(x, held.images) for x in (each.T - (there - z)[:, -1])]

        prior = NoiseContrastivePrior([ratio], base).eval().requires_grad_(False)
        under = vae.with_prior(base)
        pairs = HeldOut(under, data, rows, [0], seed=seed, device=device_)
        found = log_ratios(ratio, pairs)
        judged = calibrate_and_judge(
            ratio, found, found, pairs.kls[0], heldout_images=pairs.images, seed=seed, fit=False
        )
        prior.log_z = log_z(base_log_ratios(
            under, prior, LOG_Z_DRAWS, generator=stream(seed, "log z", device=device_),
            on_draws=lambda done: bar(DRAWS + done),
        ))  # fmt: skip
    best = max(range(len(parts)), key=lambda i: float(bounds[i].mean()))
    prior.record = {
        "settings": {"combined": " + ".join(names), "mean": mean},
        "seed": seed,
        "heldout_images": len(rows),
        "vae": fingerprint(vae),
        "networks": fingerprint(vae, without="prior"),
        "base": None,
        "groups": [judged],
        "combined": [
            {"name": name, "weight": float(weight)} | mean_and_se(bound)._asdict()
            for name, weight, bound in zip(names, weights, bounds, strict=False)
        ],
        "bound": mean_and_se(bounds[-1])._asdict(),
        "gain": mean_and_se(bounds[-1] - bounds[best])._asdict(),
    } | _of_fits(priors, data)
    return prior


def _of_fits(priors: Sequence[Any], data: ImageDataset) -> dict[str, Any]:
    """What the fits of the parts say of the whole: the rows of `data` seen, doubts of the VAE."""
    records = [prior.record for prior in priors if isinstance(prior, NoiseContrastivePrior)]
    doubts = [text for record in records for text in record.get("vae_warnings", [])]
    digest = data.digest()
    seen = [unpack_rows(x["rows"]) for x in records if x.get("data") == digest]
    found: dict[str, Any] = {"vae_warnings": list(dict.fromkeys(doubts))}
    return found | ({"rows": pack_rows(torch.cat(seen)), "data": digest} if seen else {})


def best_weights(mean_at_q: Tensor, at_base: Tensor) -> tuple[Tensor, float]:
    """The w that add up to 1 of the largest w.E_q[f] - log E_b[exp(w.f)], and that logarithm.

    None but the last is below 0.

    Args:
        mean_at_q: E_q[f], (I,).
        at_base: f at draws of the base b, (n, I).
    """
    from scipy.optimize import minimize  # which changes warning filters when it is imported

    last = at_base[:, -1]
    over_last, mean = at_base[:, :-1] - last[:, None], (mean_at_q[:-1] - mean_at_q[-1]).cpu()

    def cost(w: Any) -> tuple[float, Any]:
        some = torch.as_tensor(w, device=last.device)
        weighted = over_last @ some + last
        slope = (weighted.softmax(0) @ over_last).cpu() - mean
        return float(log_mean_exp(weighted)) - float(mean @ some.cpu()), slope.numpy()

    count = len(mean)
    start = np.full(count, 1 / count)
    found = minimize(cost, start, jac=True, method="L-BFGS-B", bounds=[(0, MOST)] * count)
    some = torch.as_tensor(found.x, device=last.device)
    return torch.cat([some, 1 - some.sum()[None]]), float(log_mean_exp(over_last @ some + last))


def best_shares(at_q: Tensor) -> Tensor:
    """The w, none below 0, that add up to 1 of the largest E_q[log sum_i w_i exp(f_i)].

    By expectation maximisation, until no share moves by more than a millionth; shares below a
    thousandth are left out then.

    Args:
        at_q: f at draws of q, the log-densities of the parts up to what all share, (n, I).
    """
    shares = torch.full_like(at_q[0], 1 / at_q.shape[1])
    for _ in range(ROUNDS):
        before, shares = shares, (at_q + shares.log()).softmax(-1).mean(0)
        if (shares - before).abs().max() < 1e-6:
            break
    shares = torch.where(shares < LEAST_SHARE, 0.0, shares)
    return shares / shares.sum()


def _log_zs(parts: Sequence[_Part], at_base: Tensor) -> Tensor:
    """log Z of each part, (I,), if need be from its log-ratio at draws of a base, (n, I).

    What is known is not estimated: from a narrow mixture log Z of a prior as wide as N(0, I) would
    come out far too low.
    """
    found = [
        log_z(x).value if part.log_z is None else part.log_z
        for part, x in zip(parts, at_base.T, strict=True)
    ]
    return torch.tensor(found, dtype=at_base.dtype, device=at_base.device)


def _part(ratio: nn.Module, base: Any, known: LogZ | None) -> _Part:
    """Its log Z is the known one, or that of a density that is normalised."""
    value = None if known is None else known.value
    return _Part(ratio, base, 0.0 if isinstance(ratio, UnitRatio) and base.normalized else value)


def _parts(vae: Any, priors: Sequence[Any]) -> list[_Part]:
    """The priors as ratios on densities, if they can be combined."""
    if vae.num_groups != 1:
        raise ValueError(
            f"combine needs a VAE with one latent group, this one has {vae.num_groups}"
        )
    if len(getattr(getattr(vae, "prior", None), "event_shape", ())) != 1:
        raise ValueError("combine needs a VAE with flat latents whose `prior` is a density")
    if len(priors) < 2:
        raise ValueError(f"priors must hold at least two to combine, got {len(priors)}")
    own, parts = fingerprint(vae), []
    known: dict[Any, Any] = {identity(vae.prior): vae.prior}
    for i, prior in enumerate(priors):
        ratio: Any = UnitRatio()
        base, known_z = prior, None
        if isinstance(prior, NoiseContrastivePrior):
            if prior.record.get("vae", own) != own:
                raise ValueError(
                    f"priors[{i}] was fitted on another VAE; fit one on this VAE first"
                )
            prior.attach(vae)
            ratio, base = prior.ratios[0], vae.prior if prior.base is None else prior.base
            known_z = prior.log_z
        if isinstance(ratio, UnitRatio) and identity(base) == identity(vae.prior):
            raise ValueError(f"priors[{i}] is the VAE's own; name priors that were fitted on it")
        if not isinstance(base, nn.Module) or not hasattr(base, "normalized"):
            raise ValueError(
                f"priors[{i}] cannot be combined: its density must be a module that says whether "
                f"it is `normalized`, got a {type(base).__name__}"
            )
        slow = getattr(base, "slow_density", False)
        if slow or not (base.normalized or hasattr(base, "unnormalized_log_prob")):
            what = "one that takes an equation for each latent" if slow else "no density"
            raise ValueError(f"priors[{i}] cannot be combined: a {type(base).__name__} has {what}")
        # One that several priors stand on is kept once.
        parts.append(_part(ratio, known.setdefault(identity(base), base), known_z))
    return parts


def _best_base(densities: Sequence[Any], at_q: Tensor) -> Any:
    """That of the highest mean log-density at draws of q."""
    apart = {id(density): density for density in densities if density.normalized}
    return max(apart.values(), key=lambda density: float(_in_pieces(density.log_prob, at_q).mean()))


def _ratio(parts: Sequence[_Part], base: Any, mean: str) -> CombinedRatio:
    """The parts over the base, each density kept once; equal weights at first."""
    others = {id(p.base): p.base for p in parts if p.base is not base}
    places = [0 if p.base is base else 1 + list(others).index(id(p.base)) for p in parts]
    (size,) = base.event_shape
    return CombinedRatio([p.ratio for p in parts], list(others.values()), places, size, base, mean)


@torch.no_grad()
def _in_pieces(function: Any, z: Tensor, bar: Bar | None = None) -> Tensor:
    """In float64."""
    pieces = []
    for some in z.split(AT_ONCE):
        pieces.append(function(some).double())
        if bar is not None:
            bar(min(len(pieces) * AT_ONCE, len(z)))
    return torch.cat(pieces)


def _bound(log_p: Tensor, images: int) -> Tensor:
    """What a prior wins in nats for each image, (images,); draws of one are `images` apart."""
    return log_p.view(-1, images).mean(0)
