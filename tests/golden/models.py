"""Tiny models, whose weights come from here and not from a library's initialisation, and data for them."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 128
LENGTH = 16

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GATED = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ROUTED = _GATED | {"num_experts_per_tok": 2}
FAMILIES = {
    "llama": _GATED | {"tie_word_embeddings": True},
    "gpt2": {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": _ROUTED | {"num_local_experts": 4},
    "qwen3_moe": _ROUTED
    | {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
}


def model(family: str = "llama") -> nn.Module:
    """Two decoder blocks of 32 features, always with the same weights."""
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SIZES, **_IDS, **FAMILIES[family]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(made.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(std=0.25, generator=generator)
    return made


class Tokens(Dataset[dict[str, Tensor]]):
    """Random sequences of token ids; the ends of some are padding, of another length in each."""

    def __init__(self, padded: bool, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=generator)
        lengths = torch.randint(LENGTH // 2, LENGTH + 1, (count,), generator=generator)
        self.mask = torch.ones_like(self.ids)
        if padded:
            self.mask = (torch.arange(LENGTH) < lengths[:, None]).long()
            self.ids = self.ids * self.mask

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, mask = self.ids[index], self.mask[index]
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loader(padded: bool = False) -> StatefulDataLoader:
    """Shuffled batches of two, always in the same order."""
    return StatefulDataLoader(Tokens(padded), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(2))


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    """Batches of four for one-shot pruning, with padding."""
    data = Tokens(padded=True)
    rows = [{"input_ids": data.ids[i : i + 4], "attention_mask": data.mask[i : i + 4]} for i in range(0, 4 * count, 4)]
    assert len(rows[-1]["input_ids"]) == 4
    return rows
