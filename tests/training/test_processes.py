"""What Fabric is asked for."""

import warnings

import pytest
import torch

from ncprior.training.processes import check_device, make_fabric

WITHOUT = {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}


def precision(monkeypatch, capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    return make_fabric("cpu", "bf16-mixed", alone=True).strategy.precision.precision


def test_a_processor_without_bfloat16_products_takes_float32(monkeypatch):
    with pytest.warns(UserWarning, match="no bfloat16 products .* 32-true is used instead"):
        assert precision(monkeypatch, WITHOUT) == "32-true"


@pytest.mark.parametrize(
    "capabilities", [WITHOUT | {"avx512_bf16": True}, WITHOUT | {"amx_bf16": True}, {}]
)
def test_others_keep_bfloat16(monkeypatch, capabilities):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert precision(monkeypatch, capabilities) == "bf16-mixed"


@pytest.mark.parametrize("device", ["cuda", "gpu", "mps", "cdua"])
def test_a_device_that_is_not_there(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"auto or cpu .* finds no GPU, got '{device}'"):
        make_fabric(device)


def test_devices_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cpu", "cuda", "gpu"):
        check_device(device)
