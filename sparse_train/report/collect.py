"""Reads a run's folder: the records of ``RunHistory``, and the recipe next to them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_train.layers import masks

HISTORY = "sparse_train_history.jsonl"
"""The file that ``sparse_train.callbacks.RunHistory`` writes."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """The records of one training run, in the order of steps."""

    name: str
    folder: Path
    recipe: str | None
    """Resolved YAML; None if the run was not started by ``sparse-train fit``."""
    starts: Sequence[Record]
    """One record, and one more each time the run was resumed."""
    baselines: Mapping[str, Record] = field(default_factory=dict)
    """Records by state: "dense", "first mask"."""
    losses: Sequence[Record] = ()
    validations: Sequence[Record] = ()
    evaluations: Sequence[Record] = ()
    """Records of ``Evaluation`` callbacks."""
    updates: Sequence[Record] = ()
    end: Record | None = None
    """None if the run is still going on, or was cut off."""

    @property
    def start(self) -> Record:
        """The start record of the latest session."""
        return self.starts[-1]

    @property
    def pruning(self) -> Mapping[str, Any] | None:
        """Settings of ``DynamicPruning``; None for a dense run."""
        settings: Mapping[str, Any] | None = self.start["pruning"]
        return settings

    @property
    def steps(self) -> int:
        """Optimizer steps up to the last record."""
        return max(int(record["step"]) for record in self._all)

    @property
    def seconds(self) -> float:
        """Training time, including validations, over all sessions up to the last record."""
        return max(float(record["seconds"]) for record in self._all)

    @property
    def sparsity(self) -> float | None:
        """Share of zeros among the targeted weights, counted on them; None for a dense run."""
        last = self._last_count
        return None if last is None else float(last["sparsity"])

    def sparsity_by_layer(self) -> dict[str, float]:
        """Share of zeros of each layer, counted on the weights, at the last count."""
        last = self._last_count
        if self.pruning is None or last is None:
            return {}
        return {
            name: zeros / size
            for (name, size), zeros in zip(self.pruning["layers"].items(), last["zeros"], strict=True)
        }

    @property
    def _all(self) -> list[Record]:
        records = [*self.starts, *self.losses, *self.validations, *self.evaluations, *self.updates]
        return [*records, *([self.end] if self.end else [])]

    @property
    def _last_count(self) -> Record | None:
        if self.end is not None and self.end["zeros"] is not None:
            return self.end
        return self.updates[-1] if self.updates else None

    def evaluated(self) -> dict[str, tuple[float, int]]:
        """The last value of each metric of ``Evaluation``, and its step."""
        return {
            name: (float(value), int(record["step"]))
            for record in self.evaluations
            for name, value in record["metrics"].items()
        }

    def changes(self) -> Sequence[Record]:
        """Updates after the first mask."""
        return self.updates[1:]

    def flips_by_layer(self) -> dict[str, float]:
        """Flips of each layer over all updates after the first mask, as a share of its weights; may exceed 1."""
        if self.pruning is None or not self.changes():
            return {}
        totals = np.sum([update["flips"] for update in self.changes()], axis=0)
        sizes = self.pruning["layers"]
        return {name: int(total) / size for (name, size), total in zip(sizes.items(), totals, strict=True)}

    def crop(self, update: Record) -> NDArray[np.bool_]:
        """The recorded corner of one layer's mask at an update, (outputs, inputs), True = kept."""
        import torch

        assert self.pruning is not None
        shape = self.pruning["crop"]
        packed_OJ = torch.tensor(list(bytes.fromhex(update["crop"])), dtype=torch.uint8).view(shape["outputs"], -1)
        mask_OI: NDArray[np.bool_] = masks.unpack(packed_OJ, shape["inputs"]).numpy()
        return mask_OI


def collect(folders: Sequence[str | Path]) -> list[Run]:
    """Read runs; each gets a name that distinguishes it from the others.

    Args:
        folders: for each run, the folder with its history, or one above it that holds no other run.

    Raises:
        ValueError: no folder, one without a history or with several, one given twice, or an unreadable history.
    """
    if not folders:
        raise ValueError("There is no run to report. Name the folder of one, such as runs/smollm2_2of4/version_0.")
    found = [_find(Path(folder)) for folder in folders]
    resolved = [folder.resolve() for folder in found]
    for folder, path in zip(found, resolved, strict=True):
        if resolved.count(path) > 1:
            raise ValueError(f"The run in {folder} is named twice. Name each run once.")
    return [_read(folder, name) for folder, name in zip(found, _names(resolved), strict=True)]


def _find(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if (folder / HISTORY).exists():
        return folder
    below = sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{HISTORY}"))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(str(path) for path in below)
        raise ValueError(f"{folder} holds {len(below)} runs: {names}. Name those to report.")
    raise ValueError(
        f"{folder} has no {HISTORY}, so nothing was recorded there. sparse-train fit writes one into the folder of its "
        "logger (such as version_0); your own trainer does with the callback sparse_train.callbacks.RunHistory."
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The last meaningful part of each path, and as many parts before it as needed to distinguish the runs."""
    parts = [list(folder.parts[1:]) for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = []
        for own in parts:
            generic = len(own) > 1 and re.fullmatch(r"version_\d+", own[-1]) is not None
            stem = own[:-1] if generic and depth == 1 else own
            names.append("/".join(stem[-depth:]))
        if len(set(names)) == len(names):
            return names
    raise AssertionError("different folders have different paths")


def _read(folder: Path, name: str) -> Run:
    path = folder / HISTORY
    kinds: dict[str, list[Record]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kinds.setdefault(record["kind"], []).append(record)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                continue  # cut off in the middle of a write: the run was killed, or is still going on
            raise ValueError(f"{path}, line {number} is not a record of a run: {error}.") from error
    if "start" not in kinds:
        raise ValueError(f"{path} has no start of a run in it. Was it cut off, or written by something else?")
    recipe = folder / "config.yaml"
    return Run(
        name=name,
        folder=folder,
        recipe=without_homes(recipe.read_text(encoding="utf-8")) if recipe.exists() else None,
        starts=kinds["start"],
        baselines={record["state"]: record for record in kinds.get("baseline", [])},
        losses=kinds.get("train", []),
        validations=kinds.get("validation", []),
        evaluations=kinds.get("evaluation", []),
        updates=kinds.get("update", []),
        end=kinds.get("end", [None])[-1],
    )


def without_homes(text: str) -> str:
    """``text`` with "~" in place of home folders, which contain user names."""
    own = re.escape(str(Path.home()))
    return re.sub(rf"(?<![\w.~])(?:{own}|/(?:home|Users)/[^/\s'\"]+)(?![\w.-])", "~", text)
