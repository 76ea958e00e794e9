"""The one loop in which networks over codes are fitted."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ncprior.numerics import stream, stream_seed
from ncprior.priors.codes import Codes

Report = Callable[[int, dict[str, float]], None]
"""Called with the step and its figures whenever the held-out loss was measured."""


def ignore(step: int, figures: dict[str, float]) -> None:
    """A report that nobody reads."""


def descend(
    module: nn.Module,
    loss: Callable[[Generator], Tensor],
    heldout_loss: Callable[[], float],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    evaluate_every: int = 100,
    patience: int = 10,
    seed: int,
    report: Report = ignore,
    average: float | None = None,
) -> list[dict[str, float]]:
    """AdamW along half a cosine; the module ends with its best weights, in evaluation mode.

    Args:
        module: What is fitted; only its parameters that require a gradient change.
        loss: The loss of one step, drawing its batch and noise from the generator (on the module's
            device).
        heldout_loss: The figure that decides, in evaluation mode and without gradient. It should
            draw the same noise each time.
        steps: Steps at most.
        learning_rate: Rate of the first step; it falls to zero.
        weight_decay: That of AdamW.
        clip_norm: Bound on the norm of the gradient; None for none.
        evaluate_every: Steps between held-out losses; the last step has one in any case.
        patience: Held-out losses without a new best after which the fit ends.
        seed: Decides all that `loss` draws.
        report: Receives each entry of the history.
        average: Decay of an exponential moving average of the weights (shorter at the start), which
            then is what is held out, and kept; None to hold out the weights themselves.

    Returns:
        The history: "step", "loss" (mean since the last entry) and "heldout_loss" of each entry.

    Raises:
        ValueError: a setting out of range, or a module without parameters.
        FloatingPointError: a loss that is NaN or infinite.
    """
    for name, value in (("steps", steps), ("evaluate_every", evaluate_every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("module must have parameters that require a gradient, got none")
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    )
    own = [p.detach() for p in parameters]  # the same memory
    held = own if average is None else _copies(own)
    generator = stream(seed, "descend", device=parameters[0].device)
    history: list[dict[str, float]] = []
    best, best_weights, since_best = math.inf, _copies(held), 0
    total, count = torch.zeros((), device=parameters[0].device), 0
    module.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        current = loss(generator)
        current.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        schedule.step()
        total, count = total + current.detach(), count + 1
        if average is not None:
            decay = min(average, (1 + step) / (10 + step))
            torch._foreach_lerp_(held, own, 1 - decay)
        if step % evaluate_every and step < steps:
            continue
        mean = float(total) / count
        _check_finite(mean, step, "loss")
        heldout = _held_out(module, heldout_loss, own, held)
        _check_finite(heldout, step, "heldout_loss")
        history.append({"step": step, "loss": mean, "heldout_loss": heldout})
        report(step, {"loss": mean, "heldout_loss": heldout})
        total, count = torch.zeros_like(total), 0
        if heldout < best:
            best, best_weights, since_best = heldout, _copies(held), 0
        else:
            since_best += 1
            if since_best >= patience:
                break
    _put(own, best_weights)
    module.eval()
    return history


@contextmanager
def first_weights(seed: int) -> Iterator[None]:
    """Modules that are made within have weights that the seed decides; global draws go on."""
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(stream_seed(seed, "prior weights"))
        yield


def maximise_likelihood(
    prior: Any,
    codes: Codes,
    *,
    batch_size: int,
    heldout: float,
    seed: int,
    report: Report = ignore,
    **descent: Any,
) -> Any:
    """Fit a `LatentPrior` with `log_prob` to q(z), and return it frozen.

    Args:
        prior: With fresh weights; it is standardised and moved to the codes' device and dtype here.
        codes: What the frozen encoder says.
        batch_size: Draws of q(z) a step.
        heldout: Share of the images on which the best weights are chosen.
        seed: Decides the split, the batches and the noise.
        report: See `descend`.
        **descent: Other arguments of `descend`.
    """
    rest, held = codes.checked().split(heldout, seed=seed)
    prior.to(codes.loc).standardize(rest)
    draws = held.each(generator=stream(seed, "held-out draws", device=codes.loc.device))

    def heldout_loss() -> float:
        total = sum(float(prior.log_prob(part).sum()) for part in draws.split(4096))
        return -total / len(draws)

    descend(
        prior,
        lambda generator: -prior.log_prob(rest.draw(batch_size, generator=generator)).mean(),
        heldout_loss,
        seed=seed,
        report=report,
        evaluate_every=50,  # few codes are learnt by heart in a few hundred steps
        **descent,
    )
    return prior.requires_grad_(False)


def _check_finite(value: float, step: int, name: str) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{name} is {value} at step {step}; fit with a smaller learning_rate or a clip_norm"
        )


@torch.no_grad()
def _held_out(
    module: nn.Module, heldout_loss: Callable[[], float], own: list[Tensor], held: list[Tensor]
) -> float:
    """The held-out loss at the weights `held`; the module's own come back afterwards."""
    kept = own if held is own else _copies(own)
    _put(own, held)
    module.eval()
    value = float(heldout_loss())
    module.train()
    _put(own, kept)
    return value


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _put(own: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(own, values, strict=True):
        tensor.copy_(value)
