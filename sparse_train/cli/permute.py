"""``sparse-train permute``: a model with its channels in an order in which N:M pruning keeps more."""

import sys
from pathlib import Path
from typing import Any, Literal

from sparse_train.data.packing import calibration_batches
from sparse_train.data.texts import PackagedWikipedia, TextSource
from sparse_train.evaluation.perplexity import check_window
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard
from sparse_train.export.hf_folder import size_of
from sparse_train.files import check_free, check_space, write_json, written_whole
from sparse_train.model_folders import PRUNING_FILE
from sparse_train.models.sources import Autocast, ModelSource, as_model_source, chosen_device, torch_dtype
from sparse_train.oneshot import permutation


def permute(
    model: ModelSource | str,
    out: str,
    text: TextSource | None = None,
    mask_structure: str = "2:4",
    num_calibration_samples: int = 32,
    max_seq_length: int = 512,
    sampling: Literal["packed", "documents"] = "packed",
    batch_size: int = 4,
    seed: int = 0,
    autocast: Autocast | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Put the channels of a dense model in an order in which N:M keeps more; it computes the same. Prune it then.

    Args:
        model: Hugging Face id or local folder with the layers of a Llama, or a model source.
        out: folder to write; must not exist.
        text: calibration text: files or folders of .txt and .jsonl, or a text source; default: the packaged Wikipedia
            text.
        mask_structure: "N:M" with N kept of every M consecutive inputs.
        num_calibration_samples: number of samples of text; all, with a warning, if there are fewer.
        max_seq_length: tokens per sample.
        sampling: "packed" cuts joined documents into samples; "documents" uses a random part of one long document for
            each sample.
        batch_size: samples per forward pass.
        seed: of the choice of samples.
        autocast: compute calibration forwards in this dtype, such as "bfloat16".
        device: where the model computes, such as "cpu" or "cuda"; default: a GPU if there is one.
    """
    folder, source, text = Path(out), as_model_source(model, dtype="auto"), text or PackagedWikipedia()
    check_free(folder)
    print("reading", source.name, "and", text.name, file=sys.stderr)
    loaded = source.load().to(chosen_device(device))
    check_window(loaded, max_seq_length, name="max_seq_length")
    check_space(folder, size_of(loaded, None))
    calibration: Any = {
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "sampling": sampling,
        "batch_size": batch_size,
        "seed": seed,
    }
    tokenizer = source.tokenizer()
    batches = calibration_batches(text, tokenizer, **calibration)
    kept = permutation.permute(loaded, batches, mask_structure, autocast=torch_dtype(autocast), progress=True)
    stage = {"channels permuted for": mask_structure, "calibration": {"text": text.name, **calibration}}
    card = ModelCard(source.name, source.hub_id, source.license, stage, stages=source.stages)
    with written_whole(folder) as beside:
        export_model(loaded, tokenizer, beside, card)
        write_json(beside / PRUNING_FILE, {"model": source.name, "stages": [*source.stages, stage]})
    print(f"{source.name} permuted to {folder}")
    print(f"{mask_structure} keeps {kept.after:.4f} of a row's Wanda scores; {kept.before:.4f} in the order before")
    return {"out": out, "kept": kept.after, "kept_before": kept.before}
