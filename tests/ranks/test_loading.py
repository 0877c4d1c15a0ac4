"""A model that one process reads and all hold a part of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from sparse_train.distributed.collectives import rank, world_size
from sparse_train.distributed.engines import whole_state_dict
from sparse_train.inspection import summary
from sparse_train.layers.sparsify import sparsify
from sparse_train.models.sources import Pretrained, load_sharded
from tests.conftest import shallow_llama
from tests.ranks import launch


class ReadOnce(Pretrained):
    def load(self) -> Any:
        assert rank() == 0
        return super().load()


def load(folder: Path) -> Any:
    mesh = torch.distributed.init_device_mesh("cpu", (world_size(),))
    model = load_sharded(ReadOnce(str(folder)), mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight or not model.config.tie_word_embeddings
    logits = model(input_ids=torch.arange(3, 19)[None]).logits
    state = whole_state_dict(model)
    sparsify(model, [model.model.layers[0].mlp.up_proj])
    with pytest.raises(ValueError, match="weights of this model are divided among processes"):
        summary(model)
    return logits.detach(), state, model.generation_config.eos_token_id


@pytest.mark.parametrize("tied", [True, False])
def test_the_sharded_model_is_the_one_that_was_read(tmp_path, tied):
    model = shallow_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    logits = model(input_ids=torch.arange(3, 19)[None]).logits
    for process, (found, state, end) in enumerate(launch.run(load, tmp_path)):
        assert torch.allclose(found, logits, atol=1e-5)
        assert end == 2
        if process == 0:
            for name, weight in model.state_dict().items():
                assert torch.equal(state[name], weight), name
