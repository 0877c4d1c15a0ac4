"""The model card of an exported folder: what the model is, how it was made, and what it is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from sparse_train.environment import versions
from sparse_train.inspection import LayerSparsity, by_projection, pruned_layers
from sparse_train.pruning.counts import sparsity_of

FILE_NAME = "README.md"
_MAKERS = ("sparse-train", "torch", "transformers")

_LIMITS = """
## What it is not

- Not smaller: these are dense safetensors with zeros in them. Any compressor makes a smaller file of them, for storing
  and sending.
- Not faster on a CPU: plain PyTorch multiplies zeros like other numbers. On GPUs with 2:4 sparse tensor cores, layers
  that are 2:4 can be converted (`torch.sparse.to_sparse_semi_structured`); no claim is made about the speed.
- Not a sparse checkpoint for vLLM or compressed-tensors, which no longer load those. They load it as a dense model.
"""

_ZEROS = "Pruned weights are exact zeros in ordinary layers. N:M counts N kept of every M consecutive inputs.\n"


@dataclass(frozen=True)
class ModelCard:
    """What is known about an exported model, in addition to what can be counted on its weights."""

    base_model: str | None = None
    """The model that was pruned, by its name in tables."""
    hub_id: str | None = None
    """Its id on the Hugging Face hub, so that the hub can link to it."""
    license: str | None = None
    """The hub's identifier, such as "apache-2.0"; only if it is known."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """How the model was made: plain data, nested as in a recipe."""
    perplexity: str | None = None
    """Perplexity, with its protocol."""
    recipe: str | None = None
    """YAML with which the model can be made again."""
    pruning: Mapping[str, Any] | None = None
    """What ``pruning.json`` is to say: where the zeros are to be, see ``export.verify``."""
    stages: Sequence[Any] = ()
    """How the base model was permuted or pruned before, as its ``pruning.json`` says."""

    def text(self, layers: Sequence[LayerSparsity]) -> str:
        """The card as Markdown, with the front matter that the hub reads.

        ``layers`` are the counted linear layers; of a model that does not fit in memory, only the pruned ones.
        """
        from huggingface_hub import ModelCardData

        sparse = pruned_layers(layers)
        patterns = sorted({layer.pattern for layer in sparse})
        front = ModelCardData(
            base_model=self.hub_id,
            library_name="transformers",
            license=self.license,
            pipeline_tag="text-generation",
            tags=["sparse-train", *(["sparse", "pruned", *patterns] if sparse else [])],
        )
        whole = f", {sparsity_of(layers):.4f} of all linear layers'" if len(layers) > len(sparse) else ""
        counted = (
            f"{sparsity_of(sparse):.4f} of the {len(sparse)} pruned layers' weights{whole}, "
            "counted on the weights that are written here"
        )
        made = {
            "base model": self.base_model,
            "made before": list(self.stages),
            **self.made,
            "counted sparsity": counted if sparse else None,
            "perplexity": self.perplexity,
            "made with": ", ".join(f"{name} {each}" for name, each in versions().items() if name in _MAKERS),
        }
        known = {name: value for name, value in made.items() if value not in (None, [])}
        parts = [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {self.base_model or 'A language model'}, {', '.join(patterns) or 'dense'}\n",
            _yaml(yaml.safe_dump(known, sort_keys=False, allow_unicode=True, width=120)),
            "Plain `AutoModelForCausalLM.from_pretrained` reads it.\n",
            *([_ZEROS] if sparse else []),
            "## By projection\n",
            "| projection | layers | sparsity | pattern |\n| --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in by_projection(layers)),
            *([_LIMITS] if sparse else []),
        ]
        if self.recipe:
            parts += ["## Recipe\n", _yaml(self.recipe)]
        return "\n".join(parts)


def write_card(folder: Path, card: ModelCard, layers: Sequence[LayerSparsity]) -> None:
    (folder / FILE_NAME).write_text(card.text(layers), encoding="utf-8")


def training_rows(settings: Mapping[str, Any], timing: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """How a run of ``MaskUpdater`` made a model, from its settings, its resolved timing and its number of steps."""
    return {"method": "trained sparse", **settings, **timing, "steps": steps}


def _yaml(text: str) -> str:
    return f"```yaml\n{text.strip()}\n```\n"
