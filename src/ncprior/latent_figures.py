"""How close the latents of base prior and NCP are to the aggregate posterior of unseen images."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ncprior.data import ImageDataset, Splits
from ncprior.figures import Figure, Figures
from ncprior.generation import Draws
from ncprior.group_samples import COMPONENTS, GroupSamples, group_samples
from ncprior.metrics import Features, median_bandwidth, pca, pixels
from ncprior.metrics.c2st import c2st
from ncprior.metrics.sliced import sliced_wasserstein
from ncprior.metrics.two_sample import SCALES, mmd_test
from ncprior.numerics import mean_and_se, stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import jsd
from ncprior.training.evidence import encode
from ncprior.training.progress import progress_bar
from ncprior.walk import device_of, evaluating, from_posterior, walk

LEAST_IMAGES = 20  # for a comparison
PILOT_IMAGES = 1000  # for bandwidths and principal components
EXTRA_DRAWS = 4000  # that the classifier test may learn from beside those compared
PERMUTATIONS = 500
DIRECTIONS = 200
NUMBERS_AT_ONCE = 1 << 22


class Pair(NamedTuple):
    """Two sets to compare."""

    x: Tensor  # (n, f)
    y: Tensor  # (n, f)
    bandwidths: Sequence[float]
    paired: bool  # whether x_i and y_i share a context
    extra: tuple[Tensor, Tensor] | None = None  # what a classifier may learn from besides


class Compared(NamedTuple):
    """A figure and, if it is that of a test, its p-value."""

    figure: Figure
    p_value: Figure | None = None


def latent_figures(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset,
    splits: Splits,
    draws: dict[str, Draws],
    *,
    metrics: Sequence[str] = ("mmd", "c2st", "swd"),
    images: int = 1000,
    proposals: int = 100,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = False,
) -> Figures:
    """MMD, classifier test and sliced Wasserstein distance from q(z) to base, NCP and others.

    q(z) is one posterior draw of each test image, which neither the VAE nor the classifiers saw;
    the others are the latents of the images already drawn, so that all metrics are of the same
    samples. The floor is the same measure between two sets of posterior draws of different unseen
    images: further test images, then validation images. No prior can be expected below it, and for
    the sliced Wasserstein distance it is above 0. All sets have as many rows, so that they compare:
    where there are few validation images, that is less than all test images.

    The classifier test also learns from the other draws of base and NCP, and from as many posterior
    draws of training images: with the few test images alone it would see little.

    Principal components (where latents have more than 500 numbers) and bandwidths are those of
    posterior draws of training images: components fit the draws that they were computed from better
    than any others, so those compared must not be among them (see `group_samples`).

    With several latent groups each is compared given the same groups before it, by `group_samples`,
    and `draws` are not used; see `group_latent_figures`.

    Args:
        vae: The VAE.
        prior: The prior behind `draws["ncp"]`; None if there are none.
        data: Its images.
        splits: Which of them are for training, validation and test.
        draws: By name, "base" among them, as `draw` gives them; "reconstruction" is left out.
        metrics: Which of "mmd", "c2st" and "swd".
        images: Test images at most, and as many draws.
        proposals: SIR's pool for groups.
        seed: Seed of posterior draws, permutations, folds and directions.
        batch_size: Images at a time.
        progress: Show a progress bar.

    Returns:
        Figures `mmd_base`, `mmd_base_p`, `c2st_base`, `c2st_base_p`, `swd_base`, and those of the
        other names and of floor; none with fewer than 20 rows to a set.

    Raises:
        ValueError: an unknown metric, a count below 1, or draws that lack "base".
    """
    _check(metrics, images)
    if vae.num_groups > 1:
        if prior is None:
            return {}
        rows, pilot = _some(splits.test, images, seed), _some(splits.train, PILOT_IMAGES, seed)
        if len(rows) < LEAST_IMAGES:
            return {}
        drawn = group_samples(
            vae, prior, data, rows, pilot,
            proposals=proposals, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        found: Figures = {}
        for k, samples in drawn:
            found |= group_latent_figures(k, samples, metrics=metrics, seed=seed)
        return found
    if "base" not in draws:
        raise ValueError(f'draws must hold "base", got {", ".join(draws) or "none"}')
    sets = {
        name: of.latents[0].flatten(1) for name, of in draws.items() if name != "reconstruction"
    }
    unseen = len(splits.test) + len(splits.validation)
    count = min(len(splits.test), unseen // 2, images, *(len(z) for z in sets.values()))
    if count < LEAST_IMAGES:
        return {}
    test = _some(splits.test, len(splits.test), seed)
    others = torch.cat([test[count:], splits.validation])[:count]
    pilot = _some(splits.train, PILOT_IMAGES, seed)
    room = min(EXTRA_DRAWS, *(len(z) - count for z in sets.values())) if "c2st" in metrics else 0
    learnt_from = splits.train.repeat(-(-room // len(splits.train)))[:room]
    named = {"pilot": pilot, "test": test[:count], "floor": others, "extra": learnt_from}
    drawn_of = {
        purpose: posterior_draws(vae, data, part, seed=seed, purpose=purpose, batch_size=batch_size)
        for purpose, part in named.items()
        if len(part) > 0
    }
    space, bandwidths = _space(drawn_of["pilot"])
    q = space(drawn_of["test"])
    extra = {}
    if room > 0:
        of_q = space(drawn_of["extra"])
        extra = {name: (of_q, space(z[count : count + room])) for name, z in sets.items()}
    sets = {name: space(z[:count]) for name, z in sets.items()}
    sets["floor"] = space(drawn_of["floor"])
    found = {}
    with progress_bar("comparing latents", len(sets) * len(metrics), shown=progress) as bar:
        for metric in metrics:
            for name, z in sets.items():
                pair = Pair(q, z, bandwidths, False, extra.get(name))
                one = COMPARE[metric](pair, seed)
                found[f"{metric}_{name}"] = one.figure
                if one.p_value is not None:
                    found[f"{metric}_{name}_p"] = one.p_value
                bar(metrics.index(metric) * len(sets) + list(sets).index(name) + 1)
    return found


def group_latent_figures(
    k: int, samples: GroupSamples, *, metrics: Sequence[str] = ("mmd", "c2st", "swd"), seed: int = 0
) -> Figures:
    """The same of one latent group, from draws that are given the same earlier groups.

    Draw i of each is exchanged with draw i of the others only, for they share a context; see
    `kernel_test`. The floor is between the two halves of the posterior draws, which are of
    different images. Bandwidths are those of all draws of q and base.

    Returns:
        Figures such as `c2st_base_3` and `mmd_ncp_p_3`. The MMD itself is left to `mmd_figures`:
        of it only the p-values are here.
    """
    _check(metrics, len(samples.posterior))
    q = samples.posterior
    widest = median_bandwidth(q, samples.base)
    bandwidths = [scale * widest for scale in SCALES]
    half = len(q) // 2
    pairs = {"base": (q, samples.base, True), "floor": (q[:half], q[half : 2 * half], False)}
    if samples.ncp is not None:
        pairs["ncp"] = (q, samples.ncp, True)
    found: Figures = {}
    for metric in metrics:
        for name, (x, y, paired) in pairs.items():
            if len(x) < LEAST_IMAGES:
                continue
            one = COMPARE[metric](Pair(x, y, bandwidths, paired), seed)
            if metric != "mmd":
                found[f"{metric}_{name}_{k}"] = one.figure
            if one.p_value is not None:
                found[f"{metric}_{name}_p_{k}"] = one.p_value
    return found


@torch.no_grad()
def posterior_draws(
    vae: Any,
    data: ImageDataset,
    rows: Tensor,
    *,
    seed: int = 0,
    purpose: str = "latents",
    batch_size: int = 500,
) -> Tensor:
    """One draw of the posterior of each image of a flat VAE, (n, f), on the CPU."""
    if vae.num_groups > 1:
        raise ValueError(f"posterior_draws needs one latent group, the VAE has {vae.num_groups}")
    device, found = device_of(vae), []
    of_images = stream(seed, f"latent images {purpose}")
    generator = stream(seed, f"latents {purpose}", device=device)
    with evaluating(vae):
        for part in rows.split(batch_size):
            evidence = encode(vae, data, part, generator=of_images, device=device)
            (z,) = walk(vae, from_posterior(generator), len(part), evidence).latents
            found.append(z.flatten(1).cpu())
    return torch.cat(found) if found else torch.zeros(0, 1)


@torch.no_grad()
def jsd_on_test_images(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    splits: Splits,
    *,
    images: int = 10_000,
    seed: int = 0,
    batch_size: int = 500,
) -> Figure:
    """JSD of q(z) and base prior by the ratios of `prior`, on test images, of a flat VAE.

    The loss of any ratios on draws that they were not fitted on is at least that of the true ones
    on average, so that log 2 - loss / 2 is a lower bound of the JSD in expectation (Eq. 3 of Aneja
    et al.). The held-out one of the fit is nearly that: its step was chosen, and two numbers of its
    calibration fitted, on the same draws. Nothing was chosen on these.
    """
    at_q, at_p = log_ratios_on_test_images(
        vae, prior, data, splits, images=images, seed=seed, batch_size=batch_size
    )
    of_q, of_p = mean_and_se(F.softplus(-at_q)), mean_and_se(F.softplus(at_p))
    se = (of_q.se**2 + of_p.se**2) ** 0.5 / 2
    note = "test images, a lower bound on average"
    return Figure(float(jsd(of_q.value + of_p.value)), "nats", len(at_q), seed, se, note=note)


def log_ratios_on_test_images(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    splits: Splits,
    *,
    images: int = 10_000,
    seed: int = 0,
    batch_size: int = 500,
) -> tuple[Tensor, Tensor]:
    """log r in nats at draws of q(z) and of the base prior, (n,) each, of a flat VAE.

    There is one draw of q for each test image, and as many of the base; the ratios were fitted on
    none of them.
    """
    under = prior.under(vae)
    rows = _some(splits.test, images, seed)
    z = posterior_draws(under, data, rows, seed=seed, purpose="jsd", batch_size=batch_size)
    device = device_of(under)
    with evaluating(under), evaluating(prior):
        group = under.group(under.start(len(rows)))
        base = group.prior.sample(generator=stream(seed, "jsd base", device=device))
        z = z.view(base.shape).to(base)
        return _log_ratios(prior, z), _log_ratios(prior, base)


def _log_ratios(prior: NoiseContrastivePrior, z: Tensor) -> Tensor:
    rows = max(1, NUMBERS_AT_ONCE // z[0].numel())
    return torch.cat([prior.log_ratio(0, part).double().cpu() for part in z.split(rows)])


def _mmd(pair: Pair, seed: int) -> Compared:
    x, y, widths, paired, _ = pair
    found = mmd_test(
        x, y, bandwidths=widths, permutations=PERMUTATIONS, paired=paired,
        generator=stream(seed, "mmd permutations"),
    )  # fmt: skip
    note = f"squared, mean of {len(widths)} kernels, bandwidths {widths[0]:.2g} to {widths[-1]:.2g}"
    p = found.p_value
    se = (p * (1 - p) / PERMUTATIONS) ** 0.5
    of_p = Figure(p, "p-value", len(x), seed, se, note=f"{PERMUTATIONS} permutations")
    return Compared(Figure(found.value, "MMD^2", len(x), seed, found.se, note=note), of_p)


def _c2st(pair: Pair, seed: int) -> Compared:
    x, y, extra = pair.x, pair.y, pair.extra
    folds = min(5, len(x) // 10) if extra is None or len(extra[0]) < len(x) else 2
    found = c2st(x, y, folds=folds, extra=extra, generator=stream(seed, "c2st"))
    rows = 0 if extra is None else len(extra[0])
    note = f"{folds}-fold cross-fitted, {rows} further draws to learn from; 0.5 is chance"
    figure = Figure(found.accuracy, "accuracy", len(x), seed, found.se, note=note)
    note = f"{found.comparisons} held-out comparisons"
    return Compared(figure, Figure(found.p_value, "p-value", len(x), seed, note=note))


def _swd(pair: Pair, seed: int) -> Compared:
    x, y = pair.x, pair.y
    found = sliced_wasserstein(
        x, y, directions=DIRECTIONS, blocks=min(20, len(x) // 2),
        generator=stream(seed, "directions"),
    )  # fmt: skip
    note = f"{DIRECTIONS} directions; above 0 for equal laws"
    return Compared(Figure(found.value, "latent units", len(x), seed, found.se, note=note))


COMPARE: dict[str, Callable[[Pair, int], Compared]] = {"mmd": _mmd, "c2st": _c2st, "swd": _swd}


def _space(pilot: Tensor) -> tuple[Features, list[float]]:
    """Principal components where there are many numbers, and bandwidths, of other draws of q."""
    long = pilot.shape[1] > COMPONENTS
    space = pca(pilot, min(COMPONENTS, len(pilot))) if long else pixels()
    median = median_bandwidth(space(pilot))
    return space, [scale * median for scale in SCALES]


def _some(rows: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of `rows`, at random."""
    return rows[torch.randperm(len(rows), generator=stream(seed, "latent rows"))[:count]]


def _check(metrics: Sequence[str], images: int) -> None:
    unknown = [name for name in metrics if name not in COMPARE]
    if unknown or isinstance(metrics, str):
        raise ValueError(f"metrics must be a list of {', '.join(COMPARE)}, got {metrics!r}")
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
