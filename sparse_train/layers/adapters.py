"""Adapters of peft around masked layers, looked at when masks are made or changed, squashed, saved or exported.

peft merges by writing ``W + BA`` into the base layer's weight. If that layer is masked, the mask prunes the sum, and
the model is no longer the one that was trained, ``mask * W + BA``. DoRA computes with the norms of all weights. Rare
kinds that multiply the weight in their own forward (HRA, HiRA, MiSS with "bat", PEANuT, SuperTuning) are not found.
"""

from torch import nn

from sparse_train.layers.masks import masked_modules


def check_adapters(model: nn.Module) -> None:
    """Raise ValueError if an adapter has been merged into a masked layer, or computes with the weights it prunes."""
    adapters = note_adapters(model)
    for name, layer in masked_modules(model).items():
        adapter = adapters.get(id(layer))
        if adapter is not None:
            check_no_dora(adapter)
        if layer.had_adapter and (adapter is None or getattr(adapter, "merged", False)):
            raise ValueError(
                f"{name.removesuffix('.')}: an adapter was merged into a masked layer, whose mask prunes what it "
                "adds. Unmerge it (unmerge_adapter), or load the model again. Save base and adapters separately; or "
                "call sparse_train.squash(model) before the merge: the merged model is then the one that was trained, "
                "and dense. An adapter inside the mask, mask_lora, merges and stays sparse."
            )


def note_adapters(model: nn.Module) -> dict[int, nn.Module]:
    """The adapters by the ids of their base layers; masked ones remember that they have been wrapped."""
    adapters = {id(module.base_layer): module for module in model.modules() if "base_layer" in module._modules}
    for layer in masked_modules(model).values():
        layer.had_adapter = layer.had_adapter or id(layer) in adapters
    return adapters


def check_no_dora(adapter: nn.Module) -> None:
    """Raise ValueError for DoRA, which computes with all weights of its base, also those that a mask prunes."""
    if any(getattr(adapter, "use_dora", {}).values()):
        raise ValueError(
            "DoRA divides by the norms of the weights of its layer, which under a mask would include pruned weights, "
            "so that the model would change when the mask is folded in. Use LoRA without use_dora; add DoRA after the "
            "masks are folded in (its base is frozen, so zeros stay); merge it first; or leave its layers out (ignore)."
        )
