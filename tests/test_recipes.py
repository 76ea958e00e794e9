import inspect
from pathlib import Path

import pytest

import ncprior
from ncprior.recipes import check_recipe, known_keys, load_recipe

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_that_come_along_are_read(file):
    assert {"data", "vae"} <= load_recipe(file).keys()


def write(directory, text):
    file = directory / "recipe.toml"
    file.write_text(text)
    return file


def test_recipe_is_read(tmp_path):
    text = '[data]\nsource = "digits"\n[vae]\npreset = "digits"\nlatent_size = 4\n[expected]\nx = 1'
    recipe = load_recipe(write(tmp_path, text))
    assert recipe["vae"] == {"preset": "digits", "latent_size": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nsteps = 1", r"unknown section 'trian' \(did you mean 'train'\?\)"),
        ("[zzz]\nsteps = 1", "unknown section 'zzz'; known are data, diagnose, energy, expected"),
        ("[train]\nstep = 1", r"unknown key in \[train\] 'step' \(did you mean 'steps'\?\)"),
        ("[fit]\nlearning_rat = 1", r"\[fit\] 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ("[vae]\nlatents = 1", r"\[vae\] 'latents' \(did you mean 'latent_size'\?\)"),
        ("[data]\nsorce = 1", r"\[data\] 'sorce' \(did you mean 'source'\?\)"),
        ("[diagnose]\nproposal = 1", r"\[diagnose\] 'proposal' \(did you mean 'proposals'\?\)"),
        ("train = 3", r"train must be a section, written \[train\]"),
        ("[train\nsteps = 1", "is not valid TOML"),
    ],
)
def test_what_nothing_takes_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "recipe.toml" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["directory", "begin", "resume", "rows", "validation", "progress", "vae"]
)
def test_what_a_run_decides_is_no_key(key):
    with pytest.raises(ValueError, match=f"unknown key in .train. '{key}'"):
        check_recipe({"train": {key: 1}}, "recipe")


def test_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml does not exist"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ValueError, match="is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "noise.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_recipe(tmp_path / "noise.toml")


def test_every_key_is_an_argument():
    """So that a recipe that passes the check cannot be a TypeError later."""
    functions = {
        "data": ncprior.load_data,
        "train": ncprior.train_vae,
        "fit": ncprior.fit_prior,
        "energy": ncprior.fit_energy,
        "diagnose": ncprior.diagnose,
    }
    for section, function in functions.items():
        assert known_keys()[section] <= set(inspect.signature(function).parameters)
    assert {"preset", "latent_size", "likelihood"} <= known_keys()["vae"]
    assert {"groups_per_scale", "num_flows", "padding"} <= known_keys()["vae"]
    assert not {"image_shape", "image_mean", "self"} & known_keys()["vae"]
