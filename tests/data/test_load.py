import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from ncprior.data import load_data


def test_options_reach_the_data_set():
    data, _ = load_data(binarize=3, flip=True)
    assert data.binarize == 3 and data.flip
    assert load_data(binarize="dynamic")[0].redrawn


def test_amounts_and_seed():
    _, splits = load_data(validation=10, test=0.5, seed=1)
    assert [len(part) for part in splits] == [1797 - 10 - 898, 10, 898]
    assert not torch.equal(splits.test, load_data(validation=10, test=0.5, seed=2)[1].test)
    with pytest.raises(ValueError, match="images for train"):
        load_data(test=1797)


def test_wrong_source_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"digits, idx, .*got 'digit'; did you mean 'digits'\?"):
        load_data("digit")
    with pytest.raises(ValueError, match=r"got 'zzzz'$"):
        load_data("zzzz")


@pytest.mark.parametrize(
    ("source", "option"),
    [
        ("digits", {"image_size": 8}),
        ("digits", {"key": "x"}),
        ("idx", {"crop": 3}),
        ("idx", {"split": "train"}),
        ("array", {"channels": 1}),
        ("array", {"column": "x"}),
        ("folder", {"key": "x"}),
        ("hub", {"key": "x"}),
    ],
)
def test_options_of_other_sources(source, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.* makes no sense for source {source!r}"):
        load_data(source, None, **option)


def test_path_is_needed_or_refused():
    with pytest.raises(ValueError, match="path='x' makes no sense for source 'digits'"):
        load_data("digits", "x")
    with pytest.raises(ValueError, match="path is needed for source 'idx'"):
        load_data("idx")


def test_path_under_the_data_directory(tmp_path, pixels, monkeypatch):
    np.save(tmp_path / "x.npy", pixels)
    with pytest.raises(FileNotFoundError, match=r"there is no x\.npy; .*NCPRIOR_DATA"):
        load_data("array", "x.npy")
    monkeypatch.setenv("NCPRIOR_DATA", str(tmp_path))
    assert len(load_data("array", "x.npy")[0]) == 10
    with pytest.raises(FileNotFoundError, match=r"there is no y\.npy nor .*y\.npy$"):
        load_data("array", "y.npy")
    with pytest.raises(FileNotFoundError, match=r"a/b\.parquet"):
        load_data("hub", "a/b.parquet")  # no name on the hub


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"binarize": "static"}, TypeError, "binarize must be"),
        ({"flip": 1}, TypeError, "flip must be"),
        ({"seed": 0.5}, TypeError, "seed must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"memory_limit": "4G"}, TypeError, "memory_limit must be an int"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        load_data(**options)


def test_global_state_is_left_alone():
    before = torch.get_rng_state()
    data, splits = load_data(binarize="dynamic", flip=True)
    data.batch(splits.test, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_import_is_cheap():
    heavy = "'sklearn', 'pyarrow', 'PIL', 'datasets', 'pandas'"
    code = f"import sys, ncprior.data; sys.exit(str([m for m in ({heavy},) if m in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stderr.strip() == "[]"
