"""KL balancing: while the KL warms up, no group of latents may starve the others.

Reference: Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder" (NeurIPS 2020),
appendix A, with the constants of the published program.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

# Weight of a group at scale s (0 is the coarsest) that holds n groups, before normalisation.
RULES: dict[str, Callable[[int, int], float]] = {
    "equal": lambda s, n: 1.0,
    "linear": lambda s, n: 2.0**s,
    "sqrt": lambda s, n: 2.0 ** (s / 2),
    "square": lambda s, n: 4.0**s / n,
}


def scale_weights(event_shapes: Sequence[tuple[int, ...]], rule: str = "square") -> list[float]:
    """alpha_k of each group, at least 1.

    Args:
        event_shapes: Shapes of the groups' latents, coarsest first. Neighbours of one shape are of
            one scale.
        rule: "square", which training uses (the area of the latents over the number of groups at
            that scale), "sqrt", "linear" or "equal".
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    weights: list[float] = []
    for s, (_, members) in enumerate(groupby(event_shapes)):
        n = len(list(members))
        weights += n * [RULES[rule](s, n)]
    smallest = min(weights)
    return [weight / smallest for weight in weights]


def balance(kls: Tensor, weights: Sequence[float]) -> Tensor:
    """gamma_k, (K,), of mean 1: proportional to (|KL_k| + 0.01) / alpha_k; without gradient.

    Args:
        kls: Mean |KL_k| over the batch in nats, (K,).
        weights: alpha_k.
    """
    alphas = torch.tensor(weights, dtype=kls.dtype, device=kls.device)
    gammas = (kls.detach() + 0.01) / alphas
    return gammas / gammas.mean()
