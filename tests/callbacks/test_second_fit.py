"""Several fits, and evaluations between them, with one callback or one trainer."""

import pytest
from torch.utils.data import DataLoader

from sparse_train import Magnitude, SparseLinear
from sparse_train.callbacks import DynamicPruning
from tests.callbacks.runs import InInit, Interrupt, Tokens, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_the_callback_can_be_used_for_a_second_fit(tmp_path):
    pruning = DynamicPruning("2:4", criterion=Magnitude(), update_freq=4)
    for _ in range(2):
        model = InInit()
        trainer(tmp_path, pruning, max_steps=5).fit(model, loader())
        assert pruning.updater.steps == 5
        assert (model.net.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
        assert not isinstance(model.net.model.layers[0].mlp.up_proj, SparseLinear)


def test_validation_leaves_nothing_behind_for_the_next_fit(tmp_path):
    path = tmp_path / "middle.ckpt"
    with pytest.raises(SystemExit):
        trainer(tmp_path, DynamicPruning("2:4"), Interrupt(6, path)).fit(InInit(), loader())
    pruning, data = DynamicPruning("2:4"), DataLoader(Tokens(), batch_size=4)
    run = trainer(tmp_path, pruning)
    run.validate(InInit(), data, ckpt_path=path, verbose=False, weights_only=False)
    run.fit(InInit(), loader())
    assert pruning.updater.steps == 12
