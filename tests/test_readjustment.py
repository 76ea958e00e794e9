import pytest
import torch
from torch import nn
from toys import linear_vae

import ncprior
from ncprior.readjustment import readjusted


def normed_vae():
    """A linear VAE whose decoder begins with a batch norm of z."""
    vae = linear_vae()
    vae.decoder = nn.Sequential(nn.BatchNorm1d(2, momentum=None), vae.decoder)
    return vae.eval()


def test_statistics_are_those_of_tempered_base_samples():
    """With momentum None the running variance is the mean of the batches': temperature^2."""
    vae = normed_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    norm = readjusted(vae, 400, temperature=0.5, batch_size=32).decoder[0]
    # The variance of 400 * 32 draws, 4 standard errors.
    assert ((norm.running_var / 0.25 - 1).abs() < 4 * (2 / 12_800) ** 0.5).all()
    assert (norm.running_mean.abs() < 4 * 0.5 / 12_800**0.5).all()
    assert not norm.training
    assert all(torch.equal(v, before[n]) for n, v in vae.state_dict().items())


def test_draw_uses_them():
    vae = normed_vae()
    plain = ncprior.draw(vae, None, 8, temperature=0.5)
    found = ncprior.draw(vae, None, 8, temperature=0.5, batch_norm_passes=400)
    torch.testing.assert_close(found.latents[0], plain.latents[0])
    expected = readjusted(vae, 400, temperature=0.5).decoder(plain.latents[0])
    torch.testing.assert_close(found.images, expected.detach())
    assert (found.images - plain.images).abs().max() > 0.1


def test_errors():
    with pytest.raises(ValueError, match="needs a VAE with batch norms"):
        ncprior.draw(linear_vae(), None, 2, batch_norm_passes=3)
    with pytest.raises(ValueError, match="at least 1"):
        readjusted(normed_vae(), 0)
