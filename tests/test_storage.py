import errno
import hashlib
import os
import resource

import pytest
import torch
from torch import nn

from ncprior.storage import (
    fingerprint,
    load_tensors,
    pack_rows,
    read_json,
    replacing,
    restore,
    save_tensors,
    unpack_rows,
    write_bytes,
    write_json,
)


@pytest.fixture
def file(tmp_path):
    """A file that is there already."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    return path


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_write_replaces_and_makes_folders(file, tmp_path):
    write_bytes(file, b"new")
    write_bytes(tmp_path / "a" / "b" / "c.bin", b"deep")
    assert file.read_bytes() == b"new" and (tmp_path / "a/b/c.bin").read_bytes() == b"deep"
    assert names(tmp_path) == ["a", "file.bin"]


def no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_full_keeps_the_previous_file(file, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    message = r"No space left on device\); the previous file is intact\. Free some space.*--resume"
    with pytest.raises(OSError, match=message) as caught:
        write_bytes(file, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old" and names(file.parent) == ["file.bin"]


def test_disk_full_leaves_no_partial_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no partial file is left"):
        write_bytes(tmp_path / "new.bin", b"new")
    assert names(tmp_path) == []


def test_real_limit_on_the_size_of_files(file):
    """The system refuses in the middle of the writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="the previous file is intact"):
            write_bytes(file, bytes(300_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"old" and names(file.parent) == ["file.bin"]


def test_directory_that_is_not_writable(file):
    """A file where a folder should be: the message names the path, nothing is lost."""
    with pytest.raises(OSError, match=r"could not write .*file\.bin/deeper"):
        write_bytes(file / "deeper", b"")
    assert file.read_bytes() == b"old"


def test_replacing_gives_up_on_an_error(file):
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old" and names(file.parent) == ["file.bin"]


def test_json(tmp_path):
    content = {"a": [1, 2.5, None], "name": "Größe"}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"a": [1,')
    with pytest.raises(ValueError, match=r"x\.json is damaged: .*; write it anew"):
        read_json(tmp_path / "x.json")


def test_tensors_round_trip(tmp_path):
    tensors = {
        "view": torch.arange(12.0).view(3, 4).T,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "double": torch.tensor([float("nan"), 0.1], dtype=torch.float64),
    }
    save_tensors(tmp_path, {"format": 1}, tensors)
    config, found = load_tensors(tmp_path)
    assert config == {"format": 1} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_restore_names_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"do not fit its config\.json: [^$]*size mismatch"):
        restore(nn.Linear(2, 2), nn.Linear(3, 2).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="Missing key"):
        restore(nn.Linear(2, 2), {}, tmp_path)


def test_fingerprint():
    """By hand, and different as soon as one bit or one name is."""
    module = nn.BatchNorm1d(2)
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    before = fingerprint(module)
    assert before == digest.hexdigest()
    module.running_mean[0] = 1e-30
    assert fingerprint(module) != before
    assert fingerprint(nn.Sequential(nn.BatchNorm1d(2))) != before


def test_fingerprint_without_a_part():
    module = nn.ModuleDict({"prior": nn.Linear(1, 1), "priors": nn.Linear(1, 1)})
    whole, rest = fingerprint(module), fingerprint(module, without="prior")
    nn.init.zeros_(module["prior"].weight)
    assert fingerprint(module) != whole and fingerprint(module, without="prior") == rest
    nn.init.zeros_(module["priors"].weight)
    assert fingerprint(module, without="prior") != rest


@pytest.mark.parametrize("rows", [[], [0], [7], [3, 1, 1000], range(5000)])
def test_rows_round_trip(rows):
    packed = pack_rows(torch.tensor([*rows], dtype=torch.int64))
    assert unpack_rows(packed).tolist() == sorted(rows)


def test_rows_take_little_room():
    rows = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[:50_000]
    assert len(pack_rows(rows)) < 60_000 / 8 * 4 / 3
