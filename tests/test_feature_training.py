import json
import struct

import pytest
import torch
from typer.testing import CliRunner

import ncprior
from ncprior.cli import app
from ncprior.data import Splits, load_data
from ncprior.feature_training import load_labelled, train_features
from ncprior.metrics import load_features
from ncprior.metrics.classifier import SHIPPED

OPTIONS = {"device": "cpu", "progress": False}


def test_digits_are_learnt_and_read_back(digits, tmp_path):
    data, splits = digits
    found = train_features(data, splits, directory=tmp_path, epochs=5, **OPTIONS)
    accuracy = found["classifier_accuracy"]
    assert accuracy.samples == 350 and accuracy.value > 0.9
    space = load_features(tmp_path)
    assert space.name == "digits" and space.class_names == [str(k) for k in range(10)]
    assert space.checksum[:8] in accuracy.note
    right = space.classes(space(data.raw(splits.test))) == data.labels[splits.test]
    assert float(right.double().mean()) == pytest.approx(accuracy.value)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["test_accuracy"] == accuracy.value and config["seed"] == 0
    assert not (tmp_path / "classifier-checkpoint.pt").exists()


def test_same_seed_same_weights(digits, tmp_path):
    data, splits = digits
    few = Splits(splits.train[:60], splits.validation, splits.test)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_features(
            data, few, directory=tmp_path / name, epochs=1, batch_size=20, seed=seed, **OPTIONS
        )
    checksums = [load_features(tmp_path / name).checksum for name in "abc"]
    assert checksums[0] == checksums[1] != checksums[2]


def test_only_training_images_are_trained_on(digits, tmp_path):
    """Labels of test images may be anything; those of validation images only choose a step."""
    data, splits = digits
    labels = data.labels.clone()
    labels[splits.test] = 0
    other = ncprior.ImageDataset(data.images, labels=labels, name="digits")
    for name, given in (("a", data), ("b", other)):
        train_features(given, splits, directory=tmp_path / name, epochs=0.3, **OPTIONS)
    assert load_features(tmp_path / "a").checksum == load_features(tmp_path / "b").checksum


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_names": ["a"]}, "class_names must be 10 different names"),
        ({"epochs": 0}, "epochs must be positive"),
        ({"batch_size": 1}, "batch_size between 2 and"),
    ],
)
def test_bad_options(options, message, digits, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_features(*digits, directory=tmp_path, **OPTIONS | options)


def test_labels_are_needed(digits, tmp_path):
    data, splits = digits
    without = ncprior.ImageDataset(data.images)
    with pytest.raises(ValueError, match="data must have labels, and images has none"):
        train_features(without, splits, directory=tmp_path, **OPTIONS)
    one = ncprior.ImageDataset(data.images, labels=torch.zeros(1797, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 classes"):
        train_features(one, splits, directory=tmp_path, **OPTIONS)


def test_where_labelled_images_come_from(tmp_path):
    assert load_labelled("digits")[0].name == "digits"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nsource = "digits"\nbinarize = "dynamic"\nvalidation = 50\n')
    data, splits = load_labelled(str(recipe))
    assert len(splits.validation) == 50 and data.binarize is None
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(struct.pack(">HBB3I", 0, 8, 3, 9, 8, 8) + bytes(9 * 64))
    with pytest.raises(ValueError, match="must have labels"):
        load_labelled(str(tmp_path))
    path.with_name("train-labels-idx1-ubyte").write_bytes(
        struct.pack(">HBBI", 0, 8, 1, 9) + bytes(range(9))
    )
    assert load_labelled(str(tmp_path))[0].labels.tolist() == list(range(9))
    with pytest.raises(FileNotFoundError):
        load_labelled(str(tmp_path / "none"))


def test_from_the_command_line(tmp_path):
    command = ["features", "train", "digits", "--out", str(tmp_path / "f"), "--epochs", "0.2"]
    done = CliRunner().invoke(app, [*command, "--device", "cpu", "--json"])
    content = json.loads(done.stdout)
    assert content["sha256"] == load_features(tmp_path / "f").checksum
    assert content["class_names"][3] == "3" and content["test_images"] == 350
    again = CliRunner().invoke(app, command)
    assert again.exit_code and "already holds features; pass --overwrite" in str(again.exception)
    names = ",".join("abcdefghij")
    options = ["--overwrite", "--class-names", names, "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, *options])
    assert "Features digits" in done.stdout and "of 350 test images" in done.stdout
    assert load_features(tmp_path / "f").class_names == list("abcdefghij")


@pytest.mark.data
@pytest.mark.slow
def test_the_shipped_classifier_on_mnist(mnist):
    """What its config.json says of the 10,000 test images, recounted."""
    data, splits = load_data("idx", mnist)
    space = load_features("mnist")
    right = space.classes(space(data.raw(splits.test))) == data.labels[splits.test]
    said = json.loads((SHIPPED / "config.json").read_text())["test_accuracy"]
    assert float(right.double().mean()) == pytest.approx(said, abs=2e-4) and said >= 0.99


@pytest.fixture
def mnist():
    import os
    from pathlib import Path

    base = Path(os.environ.get("NCPRIOR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (base / "mnist").exists():
        pytest.skip(f"no real data at {base / 'mnist'}; set NCPRIOR_DATA to where they are")
    return base / "mnist"
