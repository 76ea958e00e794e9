import pytest
import torch
from sklearn.decomposition import PCA

from ncprior.metrics import default_features, load_features, pca, pixels
from ncprior.metrics.classifier import SHIPPED, load_classifier
from ncprior.metrics.features import ModuleFeatures, check_features, label
from ncprior.storage import fingerprint


@pytest.fixture
def images(rng):
    return torch.rand(40, 1, 5, 6, generator=rng)


def test_pixels(images):
    found = pixels()(images)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, images.flatten(1).double(), rtol=0, atol=0)


def test_pca_against_scikit_learn(images):
    expected = torch.from_numpy(PCA(7).fit_transform(images.flatten(1).double().numpy()))
    found = pca(images, 7)(images)
    signs = torch.sign((found * expected).sum(0))
    torch.testing.assert_close(found * signs, expected)


def test_all_components_keep_distances(images, rng):
    """An orthonormal basis of the whole space is a rotation."""
    space, other = pca(images, 30), torch.rand(5, 1, 5, 6, generator=rng)
    torch.testing.assert_close(
        torch.cdist(space(other), space(images)),
        torch.cdist(other.flatten(1).double(), images.flatten(1).double()),
    )


@pytest.mark.parametrize("n", [40, 8])
def test_too_many_components(n, images):
    most = min(n, 30)
    with pytest.raises(ValueError, match=f"components must be at most {most} for {n} images"):
        pca(images[:n], most + 1)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((20, 1, 16, 16), "pixels"),
        ((20, 1, 16, 17), "pca-20 of pixels"),
        ((90, 1, 17, 17), "pca-64 of pixels"),
    ],
)
def test_default_features_name_their_space(shape, name, rng):
    assert default_features(torch.rand(shape, generator=rng)).name == name


def test_pca_of_many_pixels_is_quick_and_right(rng):
    """12,288 numbers per image, no square matrix of them. Data of rank 5 keep their distances."""
    images = torch.randn(60, 5, generator=rng, dtype=torch.float64)
    images = (images @ torch.randn(5, 12_288, generator=rng, dtype=torch.float64)).view(
        60, 3, 64, 64
    )
    found = pca(images, 5)(images)
    torch.testing.assert_close(
        torch.pdist(found), torch.pdist(images.flatten(1)), rtol=1e-6, atol=0
    )


class Sums(torch.nn.Module):
    """Row sums of each image; has a mode that must be left as it was."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), self.training, x.requires_grad))
        return self.weight * x.sum(3)


def test_any_module(images):
    module = Sums()
    space = load_features(module)
    assert (space.name, label(space)) == ("Sums", f"Sums {fingerprint(module)[:8]}")
    found = ModuleFeatures(module, "sums", rows_at_once=16)(images)
    assert found.dtype == torch.float64 and not found.requires_grad
    torch.testing.assert_close(found, 2 * images.sum(3).flatten(1).double(), check_dtype=False)
    assert module.seen == [(16, False, False), (16, False, False), (8, False, False)]
    assert module.training


def test_a_space_is_returned_as_it_is():
    space = pixels()
    assert load_features(space) is space and space.checksum == "" and label(space) == "pixels"


def test_names(images):
    assert load_features("pixels").name == "pixels"
    assert load_features("pca-5", images)(images).shape == (40, 5)
    with pytest.raises(ValueError, match="pca-5 need training_images"):
        load_features("pca-5")
    with pytest.raises(ValueError, match=r"features must be pixels, pca-64, mnist.*got 'fid'"):
        load_features("fid")
    with pytest.raises(FileNotFoundError, match="there is no such directory"):
        load_features("somewhere/features")


def test_checksum_of_principal_components(images):
    a, b = pca(images, 3), pca(images, 4)
    assert len(a.checksum) == 64 and a.checksum == pca(images, 3).checksum != b.checksum


def test_other_files_are_no_features(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="must be a directory that ncprior features train wrote"):
        load_features(tmp_path / "a.bin")


def test_images_of_another_size_or_range(images):
    with pytest.raises(ValueError, match=r"30 numbers each for the features pca-3 .*got 24"):
        pca(images, 3)(images[:, :, :4])
    with pytest.raises(ValueError, match=r"images must be 1x28x28 .* mnist, got 1x5x6"):
        load_features("mnist")(images)
    for bad, message in (
        (255 * images, r"must lie in \[0, 1\], got"),
        (2 * images - 1, r"must lie in \[0, 1\], got -"),
        (torch.full_like(images, torch.nan), r"must lie in \[0, 1\], got nan"),
        (images[0], r"must have the shape \(n, c, h, w\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_features(Sums())(bad)


def test_a_module_that_mixes_up_rows(images):
    with pytest.raises(ValueError, match="must be a tensor with 40 rows"):
        load_features(torch.nn.Flatten(0))(images)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.tensor([[1.0, torch.nan], [0, 0]]), "a must be finite"),
        (torch.ones(5, 2), "a must differ from image to image, but all 5 rows are the same"),
        (torch.ones(5), "n of at least 2"),
    ],
)
def test_features_that_say_nothing(features, message):
    with pytest.raises(ValueError, match=message):
        check_features(features, "a")


def test_the_shipped_classifier():
    """Its weights are those that its config.json describes, and the file is small."""
    space = load_features("mnist")
    classifier, config = load_classifier(SHIPPED)
    assert space.name == "mnist" and space.checksum == config["sha256"] == fingerprint(classifier)
    assert space.class_names == [str(k) for k in range(10)]
    assert config["test_accuracy"] >= 0.99 and config["training_images"] == 50_000
    assert (SHIPPED / "model.safetensors").stat().st_size < 1_000_000
    images = torch.rand(30, 1, 28, 28)
    features = space(images)
    assert features.shape == (30, 64) and (features >= 0).all()
    assert torch.equal(space.classes(features), classifier(images).argmax(1))
