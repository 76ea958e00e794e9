import numpy as np
import pytest
from PIL import Image

from ncprior.data import load_data


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path, pixels):
    """Ten grey pictures in two folders, beside things that are none."""
    path = tmp_path / "pictures"
    for i, picture in enumerate(pixels):
        save(path / ("a" if i < 5 else "b/c") / f"{i}.{'png' if i % 2 else 'BMP'}", picture)
    (path / "notes.txt").write_text("no picture")
    (path / "a" / "._0.png").write_bytes(b"hidden")
    return path


def test_pictures_in_order_of_names(folder, pixels, tmp_path):
    data, splits = load_data("folder", folder)
    assert data.name == "pictures" and [len(part) for part in splits] == [7, 1, 2]
    assert np.array_equal(data.images[:, 0].numpy(), pixels)
    mapped, _ = load_data("folder", folder, memory_limit=10, cache=tmp_path / "cache")
    assert isinstance(mapped.images, np.memmap)
    assert np.array_equal(mapped.images[:, 0], pixels)


def test_cache_knows_a_changed_file_and_option(folder, pixels, tmp_path):
    options = {"memory_limit": 10, "cache": tmp_path / "cache"}
    load_data("folder", folder, **options)
    load_data("folder", folder, **options)
    assert len(list(tmp_path.glob("cache/*.npy"))) == 1
    colour, _ = load_data("folder", folder, channels=3, **options)
    assert colour.image_shape == (3, 6, 5)
    save(folder / "a" / "0.BMP", np.pad(pixels[0], ((0, 0), (0, 0))) ^ 255)
    (folder / "a" / "0.BMP").touch()
    changed, _ = load_data("folder", folder, **options)
    assert np.array_equal(changed.images[0, 0], pixels[0] ^ 255)


def test_colour_crop_and_size(tmp_path):
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        save(tmp_path / f"{i}.webp", picture, lossless=True)
    plain, _ = load_data("folder", tmp_path)
    assert np.array_equal(plain.images.numpy(), pictures.transpose(0, 3, 1, 2))
    cropped, _ = load_data("folder", tmp_path, crop=4)
    assert np.array_equal(cropped.images.numpy(), plain.images.numpy()[:, :, 4:8, 3:7])
    small, _ = load_data("folder", tmp_path, crop=8, image_size=4)
    expected = [
        np.asarray(Image.fromarray(p[2:10, 1:9]).resize((4, 4), Image.Resampling.LANCZOS))
        for p in pictures
    ]
    assert np.array_equal(small.images.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    grey, _ = load_data("folder", tmp_path, channels=1, image_size=[6, 5])
    assert grey.image_shape == (1, 6, 5)


def test_no_picture_is_stretched(tmp_path):
    for i in range(6):
        wide = np.zeros((4, 8), np.uint8)
        wide[:, 2:6] = 200  # the centre square
        save(tmp_path / f"{i}.png", wide if i else np.full((4, 4), 200, np.uint8))
    data, _ = load_data("folder", tmp_path, image_size=4)
    assert (data.images == 200).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_unreadable_picture_is_named(folder, suffix):
    (folder / "b" / f"broken.{suffix}").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=f"broken.{suffix} cannot be read as an image"):
        load_data("folder", folder)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_picture_cut_short_is_named(folder, suffix):
    path = folder / f"z.{suffix}"
    save(path, np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=f"z.{suffix} cannot be read as an image"):
        load_data("folder", folder)


def test_one_bit_pictures_are_black_and_white(tmp_path):
    ink = np.random.default_rng(0).random((6, 4, 4)) < 0.5
    for i in range(6):
        Image.fromarray(ink[i]).save(tmp_path / f"{i}.png")
    data, _ = load_data("folder", tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), ink * np.uint8(255))


def extra(kind):
    rng = np.random.default_rng(0)
    if kind == "size":
        return rng.integers(0, 256, (7, 5), dtype=np.uint8)
    if kind == "colour":
        return rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    if kind == "deep":
        return rng.integers(0, 2**16, (6, 5), dtype=np.uint16)
    return rng.integers(0, 255, (6, 5, 4), dtype=np.uint8)  # transparent


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("size", "z.png has 7x5 pixels, the first image 6x5: pass image_size"),
        ("colour", "z.png has 3 channels, the first image 1: pass channels"),
        ("deep", "z.png has more than 8 bits"),
        ("transparent", "z.png has transparent pixels"),
    ],
)
def test_picture_unlike_the_others(folder, kind, message):
    save(folder / "z.png", extra(kind))
    with pytest.raises(ValueError, match=message):
        load_data("folder", folder)


def test_opaque_alpha_is_dropped(tmp_path):
    picture = np.full((4, 4, 4), 255, np.uint8)
    picture[..., 0] = 7
    for i in range(6):
        save(tmp_path / f"{i}.png", picture)
    data, _ = load_data("folder", tmp_path)
    assert data.image_shape == (3, 4, 4) and (data.images[:, 0] == 7).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"crop": 6}, ValueError, "crop=6 is more than .* has: 6x5"),
        ({"crop": 0}, ValueError, "crop must be at least 1 pixel"),
        ({"image_size": 2.5}, TypeError, "image_size must be a number of pixels"),
        ({"image_size": (2, 3, 4)}, ValueError, r"int or \(height, width\)"),
        ({"channels": 4}, ValueError, "channels must be 1"),
    ],
)
def test_bad_options(folder, options, error, message):
    with pytest.raises(error, match=message):
        load_data("folder", folder, **options)


def test_nothing_there(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images in it or below it"):
        load_data("folder", tmp_path / "empty")
    with pytest.raises(ValueError, match="takes a directory"):
        load_data("folder", folder / "notes.txt")


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pictures(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.png").write_bytes(b"never decoded: the count is checked first")
    with pytest.raises(ValueError, match=f"at least 5 images.*got {count}"):
        load_data("folder", tmp_path)
