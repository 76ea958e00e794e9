import numpy as np
import pytest
import torch

from ncprior.data.store import store

SHAPE = (4, 1, 3, 2)
CONTENT = np.arange(24, dtype=np.uint8).reshape(SHAPE)


class Fill:
    """Fills in the content and counts how often it is asked to."""

    calls = 0

    def __call__(self, array):
        self.calls += 1
        array[:] = CONTENT


def build(fill, signature=None, **options):
    return store(
        SHAPE, np.uint8, fill, name="a b/c", signature=signature or {"files": [1]}, **options
    )


def test_memory_and_file_hold_the_same(tmp_path):
    in_memory = build(Fill())
    on_disk = build(Fill(), memory_limit=23, cache=tmp_path / "new")
    assert isinstance(in_memory, torch.Tensor) and isinstance(on_disk, np.memmap)
    assert np.array_equal(in_memory.numpy(), CONTENT) and np.array_equal(on_disk, CONTENT)
    assert not on_disk.flags.writeable
    assert isinstance(build(Fill(), memory_limit=24), torch.Tensor)  # the limit itself is allowed


def test_file_is_used_again_only_if_the_signature_matches(tmp_path):
    fill = Fill()
    build(fill, memory_limit=1, cache=tmp_path)
    build(fill, memory_limit=1, cache=tmp_path)
    assert fill.calls == 1
    build(fill, signature={"files": [2]}, memory_limit=1, cache=tmp_path)
    assert fill.calls == 2


@pytest.mark.parametrize("harm", ["cut", "unvouched", "wrong note"])
def test_incomplete_file_is_made_again(tmp_path, harm):
    fill = Fill()
    build(fill, memory_limit=1, cache=tmp_path)
    (file,) = tmp_path.glob("*.npy")
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif harm == "unvouched":
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text("{}")
    assert np.array_equal(build(fill, memory_limit=1, cache=tmp_path), CONTENT)
    assert fill.calls == 2


def test_failure_leaves_nothing_behind(tmp_path):
    def fail(array):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(fail, memory_limit=1, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_limit_without_cache_says_what_to_do():
    with pytest.raises(ValueError, match=r"24 bytes, more than memory_limit=23: pass cache"):
        build(Fill(), memory_limit=23)


def test_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    class Usage:
        free = 10

    monkeypatch.setattr("ncprior.data.store.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match="10 bytes free, the images take 24"):
        build(Fill(), memory_limit=1, cache=tmp_path)
