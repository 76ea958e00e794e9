import json

import pytest
import torch

from ncprior.metrics.classifier import (
    SHIPPED,
    Classifier,
    load_classifier,
    save_classifier,
    shifted,
)


def test_logits_come_from_the_features():
    classifier = Classifier((3, 9, 12), 4, width=2, num_features=5).eval()
    images = torch.rand(6, 3, 9, 12)
    features = classifier.features(images)
    assert features.shape == (6, 5)
    torch.testing.assert_close(classifier(images), classifier.head(features))


def test_saved_and_loaded(tmp_path):
    classifier = Classifier((1, 8, 8), 3, width=2, num_features=4).eval()
    save_classifier(classifier, tmp_path, {"name": "x", "class_names": ["a", "b", "c"]})
    found, config = load_classifier(tmp_path)
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(found(images), classifier(images)) and not found.training
    assert config["name"] == "x" and config["class_names"] == ["a", "b", "c"]


def test_other_weights_are_not_taken_for_these(tmp_path):
    first, second = (Classifier((1, 8, 8), 3, width=2) for _ in range(2))
    save_classifier(first, tmp_path, {"name": "x", "class_names": ["a", "b", "c"]})
    described = (tmp_path / "config.json").read_text()
    save_classifier(second, tmp_path, {"name": "x", "class_names": ["a", "b", "c"]})
    (tmp_path / "config.json").write_text(described)
    with pytest.raises(ValueError, match=r"are not those its config\.json describes"):
        load_classifier(tmp_path)


def test_damaged_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_classifier(tmp_path)
    config = json.loads((SHIPPED / "config.json").read_text())
    weights = (SHIPPED / "model.safetensors").read_bytes()
    for changes, content, message in (
        ({"format": "another"}, weights, "must say that its format is"),
        ({"width": None}, weights, "config.json is damaged"),
        ({"num_classes": 3}, weights, "do not fit its config.json"),
        ({}, weights[:1000], "is damaged or cut short"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_classifier(tmp_path)


def test_shifted_images_are_moved_each_by_its_own(rng):
    images = torch.zeros(200, 2, 9, 7)
    images[:, 0, 4, 3], images[:, 1, 5, 2] = 1, 1
    moved = shifted(images, 2, generator=rng)
    assert moved.shape == images.shape
    found = [tuple((image == 1).nonzero()[0].tolist()) for image in moved[:, 0]]
    # 25 places, 200 draws: one of them missing has a chance of 25 * 0.96^200 = 0.7 %; this seed
    # reaches all, and no place is farther than 2.
    assert set(found) == {(row, column) for row in range(2, 7) for column in range(1, 6)}
    second = [tuple((image == 1).nonzero()[0].tolist()) for image in moved[:, 1]]
    assert all((a + 1, b - 1) == there for (a, b), there in zip(found, second, strict=True))
    assert torch.equal(shifted(images, 0, generator=rng), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(((1, 7, 9), 3), "at least 8 pixels a side"), (((1, 8, 8), 1), "num_classes must be")],
)
def test_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        Classifier(*arguments)
