"""Numbers of latent groups, from 0, as users write them: "0-4,7"."""

from collections.abc import Iterable


def check_groups(groups: str | Iterable[int], num_groups: int) -> list[int]:
    """Group numbers in order, once each, from "0-4,7" or from numbers.

    Raises:
        ValueError: none, one that the VAE does not have, or a text that is not like "0-4,7".
    """
    wanted = sorted(set(parse_groups(groups) if isinstance(groups, str) else groups))
    if not wanted or wanted[0] < 0 or wanted[-1] >= num_groups:
        raise ValueError(
            f"groups must be numbers from 0 to {num_groups - 1}, at least one, got {groups}"
        )
    return wanted


def parse_groups(text: str) -> list[int]:
    """ "0-2,5" to [0, 1, 2, 5].

    Raises:
        ValueError: anything else.
    """
    found: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f'groups must look like "0-4,7", got {text!r}')
        found |= set(range(int(first), int(last if dash else first) + 1))
    if not found:
        raise ValueError(f'groups must look like "0-4,7", lower numbers first, got {text!r}')
    return sorted(found)


def spell_groups(groups: Iterable[int]) -> str:
    """[0, 1, 2, 5] to "0-2,5"."""
    runs: list[list[int]] = []
    for k in sorted(groups):
        if runs and k == runs[-1][1] + 1:
            runs[-1][1] = k
        else:
            runs.append([k, k])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
