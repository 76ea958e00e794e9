"""The networks of several latent groups as one, for training, and apart again afterwards."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch


def join(networks: Sequence[Any]) -> Any:
    """One network whose groups are those of `networks`, which must be alike (their weights apart).

    Every parameter and buffer has its groups along the first axis; scalars (batch counters) are
    those of the first network.
    """
    first = networks[0]
    joined = remade(first, groups=len(networks))
    states = [network.state_dict() for network in networks]
    joined.load_state_dict(
        {
            name: torch.cat([state[name] for state in states]) if value.ndim else value
            for name, value in states[0].items()
        }
    )
    return joined.train(first.training)


def split(joined: Any) -> list[Any]:
    """The networks of each group of a joined one; their weights are copies."""
    networks = [remade(joined, groups=1) for _ in range(joined.groups)]
    for k, network in enumerate(networks):
        network.load_state_dict(
            {
                name: value.tensor_split(joined.groups)[k] if value.ndim else value
                for name, value in joined.state_dict().items()
            }
        )
        network.train(joined.training)
    return networks


def remade(network: Any, groups: int) -> Any:
    """A network with the same arguments for another number of groups; its weights are fresh."""
    known = inspect.signature(type(network)).parameters
    options = {name: value for name, value in network.config.items() if name in known}
    with torch.random.fork_rng([]):
        made = type(network)(**options, groups=groups)
    like = next(network.parameters())
    return made.to(device=like.device, dtype=like.dtype)
