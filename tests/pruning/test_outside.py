"""A weight that is also read outside its layer's forward is said once; the layer's own uses are not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparse_train import MaskUpdater, squash
from sparse_train.criteria import Magnitude


class Autoencoder(nn.Module):
    """Its decoder is the encoder's weight, transposed, if it is tied."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.enc, self.dec, self.tied = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False), tied

    def forward(self, x):
        # three forwards, one of them without gradients, one computed again in backward
        with torch.no_grad():
            x = x + self.enc(x).mean()
        z = self.enc(x) + checkpoint(self.enc, x, use_reentrant=False)
        return F.linear(z, self.enc.weight.t()) if self.tied else self.dec(F.layer_norm(z, (32,)))


def run(tied, dtype=torch.float32):
    model = Autoencoder(tied).to(dtype)
    updater = MaskUpdater(model, "2:4", targets=["enc"], criterion=Magnitude(), update_freq=2, total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(8):
        for _ in range(2):  # micro-batches
            F.mse_loss(model(x := torch.randn(4, 16, dtype=dtype)), x).backward()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    return model, updater


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_read_outside_its_layer_is_said_once(caplog, dtype):
    model, updater = run(tied=True, dtype=dtype)
    assert caplog.text.count("also reads the weight of enc outside") == 1
    # the reason for it: the model is another one after squash
    x = torch.randn(4, 16, dtype=dtype)
    before = model(x)
    updater.finish()
    squash(model)
    assert not torch.allclose(before, model(x), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_uses_of_the_layer_itself_are_none(caplog, dtype):
    model, _ = run(tied=False, dtype=dtype)
    assert "outside" not in caplog.text
    assert not (model.enc._forward_hooks or model.enc._forward_pre_hooks or model.enc.weight._backward_hooks)
