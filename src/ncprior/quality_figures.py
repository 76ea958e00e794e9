"""Figures of sample quality: every measure from the same samples and the same features."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.data import ImageDataset, Splits
from ncprior.figures import VAE_PRIOR, Figure, Figures
from ncprior.generation import Draws
from ncprior.metrics.features import (
    ClassifierFeatures,
    FeatureSpace,
    check_features,
    check_images,
    default_features,
    label,
    load_features,
)
from ncprior.metrics.frechet import (
    BLOCKS,
    Frechet,
    frechet_estimates,
    moment_blocks,
)
from ncprior.metrics.kernel import kid
from ncprior.metrics.modes import Modes, class_counts, compare_modes
from ncprior.metrics.neighbours import as_compared, memorised, nearest
from ncprior.metrics.precision_recall import prdc
from ncprior.numerics import Estimate, stream
from ncprior.training.progress import progress_bar

METRICS = ("fd", "fd_infinity", "kid", "prdc", "near", "modes")
FITTED_IMAGES = 20_000  # that principal components are fitted on
WIDE = 512  # features above which the jackknife takes fewer blocks
PRODUCTS = 3e11  # in a kernel matrix, above which KID goes by blocks
KID_ROWS = 1000
PRDC_ROWS = 10_000
NEAR_ROWS = 10_000
NEIGHBOURS = 5
LARGEST = 10.0  # value that a model of images in [0, 1] might still give; beyond, they are bytes
KNOWN = 0.5  # share of test images that a classifier must get right to count modes with it

Spec = str | Path | nn.Module | FeatureSpace


def quality_figures(
    draws: Mapping[str, Draws | Tensor],
    data: ImageDataset,
    splits: Splits,
    *,
    metrics: Sequence[str] = ("fd",),
    features: Spec | None = None,
    classifier: Spec | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Figures:
    """Measure sets of samples against the test images.

    Args:
        draws: Samples, images (n, c, h, w) in [0, 1], by the name that ends their figures' names.
            Values that stick out a little are cut off, as in any picture of them.
        data: The images, compared as they are stored.
        splits: Test images are what samples are measured against; training images are what they
            might have been copied from.
        metrics: Some of
            "fd": fd_NAME; where base, ncp and reconstruction are among the names fd_gain_over_base,
                FD base less FD ncp, and gap_closed, from the base or, if that is there, from
                vae_prior, with gap_closed_base besides;
            "fd_infinity": fd_infinity_NAME, the same for infinitely many images;
            "kid": kid_NAME;
            "prdc": precision_NAME, recall_NAME, density_NAME, coverage_NAME;
            "near": near_train_NAME and closer_to_train_NAME, whether samples were memorised;
            "modes": modes_tv_NAME and rarest_class_NAME.
        features: What `load_features` takes; pixels or their principal components by default.
        classifier: Likewise, for "modes"; `features` if these tell classes.
        seed: Written beside each figure, and seed of resampling.
        progress: Show a progress bar.

    Raises:
        ValueError: an unknown metric; images of another size or range than the data's; too few of
            them; features that are constant or not finite; "modes" without a classifier, or with
            one that does not know this data.
        FileNotFoundError: features that are not there.
    """
    space, judge = yardsticks(metrics, data, splits, features, classifier)
    images = {name: _images(name, found, data) for name, found in draws.items()}
    reference = data.raw(splits.test)
    made: dict[str, Callable[[str, Tensor, Tensor], Figures]] = {}
    against = space(reference)
    check_features(against, f"features {space.name} of the test images")
    if "fd" in metrics or "fd_infinity" in metrics:
        distances = _Distances(against, label(space), {"fd", "fd_infinity"} & set(metrics), seed)
        made["fd"] = distances
    if "kid" in metrics:
        made["kid"] = lambda name, _, found: _kid(name, found, against, label(space), seed)
    if "prdc" in metrics:
        made["prdc"] = lambda name, _, found: _prdc(name, found, against, label(space), seed)
    if "near" in metrics:
        train = torch.cat([as_compared(data.raw(part)) for part in splits.train.split(5000)])
        heldout = as_compared(_some(reference, min(NEAR_ROWS, len(train))))
        typical = nearest(heldout, train).distance[:, 0]  # once for all sets
        made["near"] = lambda name, part, _: _near(name, part, train, heldout, typical, seed)
    if judge is not None:
        count = _Classes(judge, judge is space, data, splits, reference, against, seed)
        made["modes"] = count
    figures: Figures = {}
    with progress_bar("quality", len(images) * len(made), shown=progress) as bar:
        for i, (name, part) in enumerate(images.items()):
            found = space(part)
            check_features(found, f"features {space.name} of {name}")
            for j, figures_of in enumerate(made.values()):
                figures |= figures_of(name, part, found)
                bar(i * len(made) + j + 1)
    if "fd" in metrics and {"base", "ncp", "reconstruction"} <= set(images):
        figures |= distances.gaps()
    by_name = [name for metric in _ORDER for name in figures if name.startswith(metric)]
    return {name: figures[name] for name in by_name}


_ORDER = (
    "fd_",
    "gap_closed",
    "kid_",
    "precision_",
    "recall_",
    "density_",
    "coverage_",
    "near_train_",
    "closer_to_train_",
    "modes_tv_",
    "rarest_class_",
)


def yardsticks(
    metrics: Sequence[str],
    data: ImageDataset,
    splits: Splits,
    features: Spec | None = None,
    classifier: Spec | None = None,
) -> tuple[FeatureSpace, ClassifierFeatures | None]:
    """What `quality_figures` measures by: the feature space and, for "modes", the classifier.

    Both are tried on two images, so that what cannot measure this data is known before samples are
    drawn. The arguments and errors are those of `quality_figures`, which takes what is returned
    as `features` and `classifier`.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {list(metrics)}")
    space = _space(features, data, splits)
    judge = _judge(classifier, space) if "modes" in metrics else None
    for yardstick in (space, judge):
        if yardstick is not None:
            yardstick(data.raw(splits.test[:2]))
    return space, judge


def frechet_figures(
    draws: Mapping[str, Draws | Tensor],
    data: ImageDataset,
    splits: Splits,
    features: Spec | None = None,
    seed: int = 0,
) -> Figures:
    """Distances of base, ncp and reconstruction to the test images, and the gap closed."""
    return quality_figures(draws, data, splits, features=features, seed=seed)


def _closed(base: Any, ncp: Any, reconstruction: Any) -> Any:
    return (base - ncp) / (base - reconstruction)


class _Distances:
    """Frechet distances to one reference, kept for what is made of several of them."""

    def __init__(self, reference: Tensor, unit: str, kinds: set[str], seed: int) -> None:
        self.blocks = BLOCKS if reference.shape[1] <= WIDE else BLOCKS // 2
        self.reference = moment_blocks(reference, self.blocks)
        self.num, self.unit, self.kinds, self.seed = len(reference), unit, kinds, seed
        self.found: dict[str, Frechet] = {}
        self.samples = 0

    def __call__(self, name: str, _: Tensor, features: Tensor) -> Figures:
        n, f = features.shape
        self.found[name] = found = frechet_estimates(
            moment_blocks(features, self.blocks), self.reference
        )
        self.samples = n
        note = f"{n} images against {self.num} test images"
        if min(n, self.num) <= f:
            note += f"; fewer than the {f} features: far too large, and not to be compared"
        made = {}
        for kind, value in (("fd", found.plain), ("fd_infinity", found.at_infinity)):
            if kind in self.kinds:
                said = f"{note}, extrapolated to infinitely many" if kind != "fd" else note
                made[f"{kind}_{name}"] = Figure(
                    value.value, f"squared, {self.unit}", n, self.seed, value.se, note=said
                )
        return made

    def gaps(self) -> Figures:
        """What the NCP wins over its base, and the shares of the gap that both close."""
        won = self._of(lambda base, ncp: base - ncp, "base", "ncp")
        unit, note = f"squared, {self.unit}", "FD base - FD ncp"
        gain = Figure(won.value, unit, self.samples, self.seed, won.se, note=note)
        if VAE_PRIOR not in self.found:
            return {"fd_gain_over_base": gain, "gap_closed": self._gap("base", "ncp")}
        return {
            "fd_gain_over_base": gain,
            "gap_closed": self._gap(VAE_PRIOR, "ncp"),
            "gap_closed_base": self._gap(VAE_PRIOR, "base"),
        }

    def _gap(self, start: str, to: str) -> Figure:
        """The share of the gap from `start` that `to` closes."""
        share = self._of(_closed, start, to, "reconstruction")
        named = start.replace("_", " ")
        note = f"(FD {named} - FD {to}) / (FD {named} - FD reconstruction)"
        return Figure(share.value, "share", self.samples, self.seed, share.se, note=note)

    def _of(self, function: Callable[..., Any], *names: str) -> Estimate:
        """A function of several distances, with its jackknife error over these sets and the test's.

        They share the test images, so that errors of single distances say little of it.
        """
        sets = [self.found[name] for name in names]
        plain = [found.plain.value for found in sets]
        left_out = [function(*[found.without_b for found in sets])]
        for i, found in enumerate(sets):
            varied: list[Any] = list(plain)
            varied[i] = found.without_a
            left_out.append(function(*varied))
        se = math.sqrt(sum((len(part) - 1) * float(part.var(correction=0)) for part in left_out))
        return Estimate(function(*plain), se)


def _kid(name: str, features: Tensor, against: Tensor, unit: str, seed: int) -> Figures:
    n, m = len(features), len(against)
    large = n * m * features.shape[1] > PRODUCTS and min(n, m) >= 2 * KID_ROWS
    found = kid(features, against, block_rows=KID_ROWS if large else None)
    note = f"{n} images against {m} test images"
    note += f", in blocks of {KID_ROWS}" if large else ""
    return {f"kid_{name}": Figure(found.value, f"MMD^2, {unit}", n, seed, found.se, note=note)}


def _prdc(name: str, features: Tensor, against: Tensor, unit: str, seed: int) -> Figures:
    count = min(len(features), len(against), PRDC_ROWS)  # these figures compare at equal numbers
    found = prdc(_some(against, count), _some(features, count), k=NEIGHBOURS)
    note = f"{NEIGHBOURS} neighbours, {count} images against as many test images"
    return {
        f"{figure}_{name}": Figure(value, f"share, {unit}", count, seed, se, note=note)
        for figure, (value, se) in found._asdict().items()
    }


def _near(
    name: str, images: Tensor, train: Tensor, heldout: Tensor, typical: Tensor, seed: int
) -> Figures:
    compared = as_compared(_some(images, NEAR_ROWS))
    near, closer = memorised(compared, train, heldout, typical=typical)
    n, h = len(compared), len(heldout)
    notes = {
        f"near_train_{name}": (
            near,
            f"nearer to one of {len(train)} training images than 95 % of {h} test images are; "
            "0.05 if like new images, more if smoother or copied",
        ),
        f"closer_to_train_{name}": (
            closer,
            f"nearest image is for training, of {h} such and {h} test images; 0.5 if not memorised",
        ),
    }
    return {
        figure: Figure(found.value, "share", n, seed, found.se, note=note)
        for figure, (found, note) in notes.items()
    }


class _Classes:
    """Class histograms against that of the test images, by the same classifier."""

    def __init__(
        self,
        judge: ClassifierFeatures,
        shared: bool,
        data: ImageDataset,
        splits: Splits,
        reference: Tensor,
        against: Tensor,
        seed: int,
    ) -> None:
        self.judge, self.shared, self.seed = judge, shared, seed
        classes = judge.classes(against if shared else judge(reference))
        self.num = len(judge.class_names)
        self.reference = class_counts(classes, self.num)
        self.said = label(judge)
        if data.labels is not None:
            right = float((classes == data.labels[splits.test]).double().mean())
            if right < KNOWN:
                raise ValueError(
                    f"classifier {label(judge)} must know the classes of {data.name}, but is right "
                    f"on {right:.0%} of its test images; ncprior features train makes one that does"
                )
            self.said += f", right on {right:.1%} of the test images"

    def __call__(self, name: str, images: Tensor, features: Tensor) -> Figures:
        n, judge = len(images), self.judge
        classes = judge.classes(features if self.shared else judge(images))
        found = self.compare(class_counts(classes, self.num), name)
        k = found.rarest
        shares = [counts[k] / counts.sum() for counts in (found.counts, found.reference)]
        total = found.total_variation
        return {
            f"modes_tv_{name}": Figure(
                total.value,
                "total variation",
                n,
                self.seed,
                total.se,
                note=f"of classes; {found.by_chance:.4f} by chance; classifier {self.said}",
            ),
            f"rarest_class_{name}": Figure(
                found.ratio,
                "share over share",
                n,
                self.seed,
                interval=found.ratio_interval,
                note=f"class {judge.class_names[k]}: {shares[0]:.2%} of samples and "
                f"{shares[1]:.2%} of {int(found.reference.sum())} test images",
            ),
        }

    def compare(self, counts: Tensor, name: str) -> Modes:
        return compare_modes(
            counts, self.reference, generator=stream(self.seed, f"modes of {name}")
        )


def _images(name: str, found: Draws | Tensor, data: ImageDataset) -> Tensor:
    """Images of the data's size, cut to [0, 1] where means of a likelihood stick out a little."""
    images = found if isinstance(found, Tensor) else found.images
    if tuple(images.shape[1:]) != data.image_shape:
        raise ValueError(
            f"images of {name} must be {_size(data.image_shape)} as those of {data.name}, got "
            f"{_size(images.shape[1:])}"
        )
    low, high = (float(value) for value in images.aminmax())
    bytes_ = high > LARGEST
    signed = -1 <= low < -0.5 and high <= 1
    # Anything else is what a model makes of the data's range; NaN stays NaN when cut.
    inside = images.clamp(0, 1)
    check_images(images if bytes_ or signed else inside, f"images of {name}")
    return inside


def _space(features: Spec | None, data: ImageDataset, splits: Splits) -> FeatureSpace:
    if features is None:
        return default_features(data.raw(splits.train[:FITTED_IMAGES]))
    needs = isinstance(features, str) and features.startswith("pca-")
    return load_features(features, data.raw(splits.train[:FITTED_IMAGES]) if needs else None)


def _judge(classifier: Spec | None, space: FeatureSpace) -> ClassifierFeatures:
    judge = space if classifier is None else load_features(classifier)
    if not isinstance(judge, ClassifierFeatures):
        raise ValueError(
            f"modes need a classifier, and {judge.name} tells no classes: pass mnist for MNIST, or "
            "a directory that ncprior features train made of your data"
        )
    return judge


def _some(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows at even steps, since data may be ordered; all where they are fewer."""
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count) * len(rows) // count]


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
