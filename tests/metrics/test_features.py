import pytest
import torch
from sklearn.decomposition import PCA

from ncprior.metrics import default_features, pca, pixels


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
