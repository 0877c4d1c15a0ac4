"""The model card of an exported folder: what the model is, how it was made, and what it is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparse_train.allocation import Uniform
from sparse_train.description import describe
from sparse_train.inspection import LayerSparsity, by_projection, overall_sparsity, pruned

FILE_NAME = "README.md"

_LIMITS = """\
## What it is not

- Not smaller: these are dense safetensors with zeros in them. `sparse-train pack` makes a smaller file of them, for
  storing and sending.
- Not faster on a CPU: plain PyTorch multiplies zeros like other numbers. On GPUs with 2:4 sparse tensor cores, layers
  that are 2:4 can be converted (`sparse_train.layers.semi_structured`); no claim is made about the speed.
- Not a sparse checkpoint for vLLM or compressed-tensors, which no longer load those. They load it as a dense model.
"""


@dataclass(frozen=True)
class ModelCard:
    """What is known about an exported model, in addition to what can be counted on its weights."""

    base_model: str | None = None
    """The model that was pruned, by its name in tables."""
    hub_id: str | None = None
    """Its id on the Hugging Face hub, so that the hub can link to it."""
    license: str | None = None
    """The hub's identifier, such as "apache-2.0"; only if it is known."""
    made: Mapping[str, str] = field(default_factory=dict)
    """How the model was made: rows of the card's table, such as method, criterion, calibration."""
    perplexity: str | None = None
    """Perplexity, with its protocol."""
    recipe: str | None = None
    """YAML with which the model can be made again."""
    pruned_alone: bool = False
    """Whether ``text`` gets only the pruned layers, as for a model that does not fit in memory."""

    def text(self, layers: Sequence[LayerSparsity]) -> str:
        """The card as Markdown, with the front matter that the hub reads.

        Args:
            layers: the linear layers of the model, counted.
        """
        from huggingface_hub import ModelCardData

        found = pruned(layers)
        patterns = sorted({layer.pattern for layer in found})
        name = self.base_model or "A language model"
        front = ModelCardData(
            base_model=self.hub_id,
            library_name="transformers",
            license=self.license,
            pipeline_tag="text-generation",
            tags=["sparse-train", "sparse", "pruned", *patterns],
        )
        whole = "" if self.pruned_alone else f", {overall_sparsity(layers):.4f} of all linear layers'"
        rows = {
            **({"base model": self.base_model} if self.base_model else {}),
            **self.made,
            "sparsity": f"{overall_sparsity(found):.4f} of the {len(found)} pruned layers' weights{whole}, counted "
            "on the weights that are written here",
            **({"perplexity": self.perplexity} if self.perplexity else {}),
            "made with": f"sparse-train {version('sparse-train')}, torch {version('torch')}, "
            f"transformers {version('transformers')}",
        }
        parts = [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {name}, {', '.join(patterns) or 'dense'}\n",
            _table(("", ""), [(row, _cell(value)) for row, value in rows.items()]),
            "Plain `AutoModelForCausalLM.from_pretrained` reads it: pruned weights are exact zeros in ordinary layers. "
            "N:M counts N kept of every M consecutive inputs.\n",
            "## By projection\n",
            _table(("projection", "layers", "sparsity", "pattern"), by_projection(layers)),
            _LIMITS,
        ]
        if self.recipe:
            parts.append(f"## Recipe\n\n```yaml\n{self.recipe.strip()}\n```\n")
        return "\n".join(parts)


def write_card(folder: Path, card: ModelCard, layers: Sequence[LayerSparsity]) -> None:
    """Write the card of a model into its folder, replacing an existing one."""
    (folder / FILE_NAME).write_text(card.text(layers), encoding="utf-8")


_UNIFORM = describe(Uniform())


def training_rows(settings: Mapping[str, str], timing: Mapping[str, Any], steps: int) -> dict[str, str]:
    """How a run of ``MaskUpdater`` made a model, from its ``settings``, ``timing`` and number of steps."""
    adapters, policy = settings.get("mask_lora"), settings["policy"]
    comes_back = settings.get("comes_back") != "never"
    how = "with re-pruning" if comes_back else "with masks in which no weight comes back"
    allocation = settings.get("allocation", _UNIFORM)
    looked_at = "recomputed" if comes_back else "changed only if the schedule asks for more zeros,"
    return {
        "method": f"trained sparse {how}, {settings['criterion']}, {settings['mask_structure']}, "
        f"{settings['schedule']}, {policy}" + ("" if allocation == _UNIFORM else f", divided by {allocation}"),
        "masks": f"{looked_at} every {timing['update_freq']} steps from step {timing['start_step']} to "
        f"{timing['end_step']}, then frozen; {steps} steps in all",
        **_scoring_row(settings, timing),
        **({"trained": f"low-rank adapters inside the masks, merged: {adapters}"} if adapters else {}),
    }


def _scoring_row(settings: Mapping[str, str], timing: Mapping[str, Any]) -> dict[str, str]:
    if settings.get("statistics", "none") == "none":
        return {}
    margin = "" if settings["margin"] == "none" else f", {settings['margin']}"
    return {"norms": f"of the {timing['window']} steps before an update, memory {settings['memory']}{margin}"}


def oneshot_rows(details: Mapping[str, Any]) -> dict[str, str]:
    """How one-shot pruning made a model, from its ``pruning.json``."""
    rows = {}
    for index, stage in enumerate(details["stages"]):
        allocation = "" if stage["allocation"] == _UNIFORM else f", {stage['allocation']}"
        rows["method" if index == 0 else f"stage {index + 1}"] = (
            f"pruned in one shot, without training: {stage['criterion']}, {stage['mask_structure']}{allocation}"
        )
    if data := details["calibration"]:
        rows["calibration"] = (
            f"{data['num_calibration_samples']} x {data['max_seq_length']} tokens of {data['text']} "
            f"({data['sampling']}), seed {data['seed']}"
        )
    return rows


def perplexity_line(found: Mapping[str, Any]) -> str:
    """A perplexity with the details needed to compare it, from ``PerplexityResult.as_dict()``."""
    where = f"{found['data']}, {found['split']}, windows of {found['window']}"
    return f"{found['perplexity']:.2f}: token perplexity of {where}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
