"""Classifier two-sample test: how well a fresh classifier tells two sets of features apart."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor


class ClassifierTest(NamedTuple):
    """How often a classifier is right about rows that it was not fitted on."""

    accuracy: float  # cross-fitted; 0.5 is chance
    se: float
    p_value: float  # of equal laws
    comparisons: int  # behind the p-value


def c2st(
    x: Tensor,
    y: Tensor,
    *,
    folds: int = 5,
    extra: tuple[Tensor, Tensor] | None = None,
    classifier: Callable[[int], Any] | None = None,
    generator: Generator,
) -> ClassifierTest:
    """Held-out accuracy of a classifier between rows of x and of y, and whether that is chance.

    By default the classifier is the mean of three that see different things: logistic regression on
    the standardised features and their squares, the nearest neighbours, and boosted trees. Each row
    is judged by one that was fitted on the other folds. The accuracy is that of a classifier of
    this many rows: with more it would be higher where the laws differ.

    Cross-fitted judgements depend on each other, because each row is also among those that others'
    classifiers were fitted on; a binomial test of the accuracy would reject too often. The p-value
    is of other judgements, which are exactly independent under equal laws: each fold is judged by
    what was fitted on `extra` and on the folds before it, and counted is how often of x_i and y_i
    the former has the larger score, which is a fair coin whatever came before.

    Args:
        x: Features (n, f), rows independent of each other.
        y: Features (n, f), as many. Row i may depend on row i of `x`, if under equal laws the two
            could be exchanged; they are always in the same fold.
        folds: Number of folds, 2 at least.
        extra: More rows (m, f) of x's kind and as many of y's, independent of those above, that
            every classifier is fitted on and none is tested with. Those of x's kind may follow a
            slightly other law, such as that of images seen in training: this costs power alone.
        classifier: From a seed to an unfitted classifier of scikit-learn's kind, with `fit` and
            `predict_proba`.
        generator: Of the folds, of the classifiers, and of a coin for ties, on the CPU.

    Returns:
        The accuracy with its standard error over pairs of rows. The error takes folds as
        independent, which is right where laws differ (Bayle et al., NeurIPS 2020); where they are
        equal it was a fifth to a quarter too small in simulations. The p-value does not use it.

    Raises:
        ValueError: shapes that do not go together, fewer than 10 rows for each fold, fewer than 2
            folds, numbers that are not finite.

    Reference: Lopez-Paz and Oquab (ICLR 2017), section 3, who split once; the p-value is a
    prequential one (Dawid 1984).
    """
    n = len(x)
    if x.shape != y.shape or x.ndim != 2 or folds < 2 or n < 10 * folds:
        raise ValueError(
            "x and y must both be (n, f) with at least 10 rows for each of 2 or more folds, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}, {folds=}"
        )
    more = extra or (x[:0], y[:0])
    if more[0].shape != more[1].shape or more[0].shape[1:] != x.shape[1:]:
        raise ValueError(
            f"extra must be two sets of as many rows of {x.shape[1]} numbers, "
            f"got {tuple(more[0].shape)} and {tuple(more[1].shape)}"
        )
    if not all(part.isfinite().all() for part in (x, y, *more)):
        raise ValueError("x, y and extra must be finite, found NaN or infinity")
    x, y = (torch.cat(pair).double().cpu() for pair in ((x, more[0]), (y, more[1])))
    beyond = torch.arange(n, len(x))
    make = classifier or _classifier
    parts = list(torch.randperm(n, generator=generator).tensor_split(folds))
    seeds = torch.randint(2**31, (2 * folds,), generator=generator).tolist()
    right, larger = [], []
    for k, part in enumerate(parts):
        others = torch.cat([beyond, *parts[:k], *parts[k + 1 :]])
        of_x, of_y = _scores(make(seeds[k]), x, y, others, part)
        right.append(((of_x > 0.5).double() + (of_y < 0.5).double()) / 2)
        right[-1] += ((of_x == 0.5).double() + (of_y == 0.5).double()) / 4
        before = torch.cat([beyond, *parts[:k]])
        if len(before) == 0:
            continue
        if k < folds - 1:
            of_x, of_y = _scores(make(seeds[folds + k]), x, y, before, part)
        coin = torch.rand(len(part), generator=generator) < 0.5
        larger.append((of_x > of_y) | ((of_x == of_y) & coin))
    correct = torch.cat(right)
    won = torch.cat(larger)
    se = float(correct.std()) / len(correct) ** 0.5
    p_value = _at_least(int(won.sum()), len(won))
    return ClassifierTest(float(correct.mean()), se, p_value, len(won))


def _scores(model: Any, x: Tensor, y: Tensor, fitted: Tensor, judged: Tensor) -> tuple[Tensor, ...]:
    """Probability of being of x for the `judged` rows of x and of y, by one of `fitted` rows."""
    labels = torch.cat([torch.ones(len(fitted)), torch.zeros(len(fitted))])
    model.fit(torch.cat([x[fitted], y[fitted]]).numpy(), labels.numpy())
    return tuple(torch.from_numpy(model.predict_proba(of[judged].numpy())[:, 1]) for of in (x, y))


def _classifier(seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, VotingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    quadratic = make_pipeline(
        StandardScaler(),
        FunctionTransformer(_with_squares),
        StandardScaler(),
        LogisticRegression(C=0.01, max_iter=200),
    )
    near = make_pipeline(StandardScaler(), KNeighborsClassifier(15))
    trees = HistGradientBoostingClassifier(
        early_stopping=True,
        validation_fraction=0.15,
        n_iter_no_change=5,
        random_state=seed,
    )
    parts = [("quadratic", quadratic), ("near", near), ("trees", trees)]
    return VotingClassifier(parts, voting="soft")


def _with_squares(features: Any) -> Any:
    import numpy as np

    return np.concatenate([features, features**2], 1)


def _at_least(count: int, of: int) -> float:
    """The probability of `count` heads or more in `of` throws of a fair coin."""
    from scipy.stats import binom

    return float(binom.sf(count - 1, of, 0.5))
