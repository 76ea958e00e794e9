"""The pixels of a grid, by decoding the PNG."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from ncprior.report import grid
from ncprior.report.pictures import GAP, LARGEST_CELL


def decoded(content):
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    return np.array(image)


def test_cells_are_the_images_and_gaps_are_transparent(rng):
    images = torch.randint(256, (5, 3, 4, 6), generator=rng) / 255
    found = decoded(grid(images, columns=3, scale=2))
    height, width = 4 * 2, 6 * 2
    assert found.shape == (2 * height + GAP, 3 * width + 2 * GAP, 4)
    covered = np.zeros(found.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = (i // 3) * (height + GAP), (i % 3) * (width + GAP)
        cell = found[top : top + height, left : left + width]
        covered[top : top + height, left : left + width] = True
        expected = (image * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(cell[::2, ::2, :3], expected)
        np.testing.assert_array_equal(cell[1::2, 1::2, :3], expected)
    assert (found[covered][:, 3] == 255).all()
    assert (found[~covered] == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_have_their_names_beside_them(channels, rng):
    images = torch.rand(6, channels, 8, 8, generator=rng)
    plain = decoded(grid(images, columns=2))
    named = decoded(grid(images, columns=2, labels=["gaussian", "", "ncp"]))
    margin = named.shape[1] - plain.shape[1]
    np.testing.assert_array_equal(named[:, margin:], plain)
    rows = [named[top : top + 32, :margin, -1] for top in range(0, 3 * (32 + GAP), 32 + GAP)]
    assert [bool(row.any()) for row in rows] == [True, False, True]
    first = [int(np.flatnonzero(row.any(0))[0]) for row in (rows[0], rows[2])]
    assert 0 < first[0] < first[1]  # the longer name is not cut off, and both end together


def test_grey_is_clipped_and_stays_grey():
    images = torch.tensor([-0.5, 0.0, 0.5, 2.0]).view(4, 1, 1, 1)
    found = decoded(grid(images, scale=1))
    assert found.shape == (1, 4 + 3 * GAP, 2)
    assert found[0, :: 1 + GAP, 0].tolist() == [0, 0, 128, 255]


@pytest.mark.parametrize(
    ("side", "cell"), [(1, 32), (8, 32), (20, 40), (28, 56), (31, 62), (64, 64)]
)
def test_a_cell_is_32_to_64_pixels(side, cell):
    assert decoded(grid(torch.zeros(1, 1, side, side))).shape == (cell, cell, 2)


def test_large_images_are_averaged_down():
    images = torch.zeros(1, 1, 256, 256)
    images[..., ::2] = 1
    found = decoded(grid(images))
    assert found.shape == (LARGEST_CELL, LARGEST_CELL, 2)
    assert (found[..., 0] == 128).all()


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(3, 8, 8), {}, "shape"),
        (torch.zeros(2, 2, 8, 8), {}, "shape"),
        (torch.zeros(0, 1, 8, 8), {}, "shape"),
        (torch.full((1, 1, 8, 8), torch.nan), {}, "finite"),
        (torch.zeros(1, 1, 8, 8), {"columns": 0}, "columns"),
        (torch.zeros(1, 1, 8, 8), {"scale": 0}, "scale"),
    ],
)
def test_rejects_what_it_cannot_draw(images, options, message):
    with pytest.raises(ValueError, match=message):
        grid(images, **options)
