"""Recipes: TOML files whose sections are keyword arguments, checked before anything runs."""

import difflib
import inspect
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SECTIONS = ("data", "vae", "train", "fit", "energy", "diagnose", "expected")
RUN_OPTIONS = {
    "directory", "begin", "resume", "progress", "rows", "splits", "heldout_rows", "part"
}  # fmt: skip

Recipe = dict[str, dict[str, Any]]


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not TOML, or has a section or key that nothing takes; the message names
            the nearest one that exists.
    """
    try:
        with path.open("rb") as file:
            recipe = tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"recipe {path} does not exist") from None
    except IsADirectoryError:
        raise ValueError(f"recipe {path} is a directory; name a TOML file in it") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid TOML: {error}") from None
    for stamp in ("format", "version"):  # those of a run's config.toml, which is a recipe too
        recipe.pop(stamp, None)
    check_recipe(recipe, str(path))
    return recipe


def check_recipe(recipe: Recipe, name: str) -> None:
    """See that every section and key is one that the program takes."""
    _check_names(recipe, SECTIONS, f"{name}: unknown section")
    for section, keys in known_keys().items():
        given = recipe.get(section, {})
        if not isinstance(given, dict):
            raise ValueError(f"{name}: {section} must be a section, written [{section}]")
        _check_names(given, keys, f"{name}: unknown key in [{section}]")


def known_keys() -> dict[str, set[str]]:
    """The keys of each section: the keyword arguments of the function behind it."""
    from ncprior.data import load_data
    from ncprior.diagnosis import diagnose
    from ncprior.training import fit_prior, train_vae
    from ncprior.vaebm import fit_energy
    from ncprior.vaes.build import build_vae, flat_vae
    from ncprior.vaes.nvae import NVAE

    of_the_data = {"image_shape", "image_mean"}
    return {
        "data": _arguments(load_data),
        "vae": (_arguments(build_vae) | _arguments(flat_vae) | _arguments(NVAE)) - of_the_data,
        "train": _arguments(train_vae) - {"vae", "data", *RUN_OPTIONS},
        "fit": _arguments(fit_prior) - {"vae", "data", *RUN_OPTIONS},
        "energy": _arguments(fit_energy) - {"vae", "data", "prior", *RUN_OPTIONS},
        "diagnose": _arguments(diagnose) - {"vae", "data", "prior", "features", *RUN_OPTIONS},
    }


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean ...?)" where one of `names` is near, else all of them."""
    names = sorted(names)
    return suggestion(name, names) or f"; known are {', '.join(names)}"


def suggestion(name: str, names: Iterable[str]) -> str:
    """ " (did you mean ...?)" where one of `names` is near, else nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _arguments(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


def _check_names(given: Iterable[str], known: Iterable[str], message: str) -> None:
    for name in given:
        if name not in set(known):
            raise ValueError(f"{message} {name!r}{nearest(name, known)}")
