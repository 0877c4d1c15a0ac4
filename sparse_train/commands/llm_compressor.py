"""Recipes of llm-compressor (github.com/vllm-project/llm-compressor), read as calls of ``sparse_train.prune``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]
from jsonargparse import get_loader

from sparse_train.allocation import OWL, Allocation, PerBlock
from sparse_train.arguments import check_sparsity
from sparse_train.commands.yaml_numbers import install
from sparse_train.criteria import Criterion, Magnitude, Wanda
from sparse_train.patterns import NM, Group, Pattern, Unstructured
from sparse_train.solvers import Solver, SparseGPT
from sparse_train.suggestions import did_you_mean


@dataclass(frozen=True)
class Stage:
    """One call of ``sparse_train.prune``; the fields have the names of its arguments."""

    criterion: Criterion | Solver
    mask_structure: str | Pattern
    sparsity: float | None
    """None if the pattern or the allocation determines it."""
    allocation: Allocation | None
    """None = the same sparsity everywhere."""
    targets: list[str] | None
    ignore: list[str]


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for, in order."""

    stages: list[Stage]
    notes: list[str]
    """What cannot be honoured in one shot, one sentence each."""


_EXAMPLE = "{pruning_stage: {pruning_modifiers: {WandaPruningModifier: {sparsity: 0.5}}}}"
_TRAINING = (
    "in training it is DynamicPruning(policy=Fixed()), as in recipes/smollm2_2of4_static.yaml, or, for zeros that "
    "follow no pattern, sparse_train.keep_zeros(model)"
)
_QUANTIZES = re.compile("Quant|GPTQ|AWQ|AutoRound|Equalization|QuIP|IMatrix", re.IGNORECASE)
_ALL = {"__ALL__", "__ALL_PRUNABLE__", "__ALL_QUANTIZABLE__"}
_SCORED = ("sparsity", "sparsity_profile", "mask_structure", "owl_m", "owl_lmbda", "targets", "ignore")
_HONOURED = {
    "WandaPruningModifier": _SCORED,
    "SparseGPTModifier": (*_SCORED, "block_size", "dampening_frac", "percdamp", "preserve_sparsity_mask", "quantize"),
    "MagnitudePruningModifier": ("final_sparsity", "mask_structure", "apply_globally", "targets", "ignore"),
    "ConstantPruningModifier": ("targets",),
}
_SCHEDULE = ("init_sparsity", "start", "end", "update", "update_scheduler", "scheduler_args")
_OPERATIONAL = ("sequential_targets", "sequential_update", "start", "end", "update")
_WITHOUT_EFFECT = {
    "WandaPruningModifier": _OPERATIONAL,
    "SparseGPTModifier": (*_OPERATIONAL, "offload_hessians"),
    "MagnitudePruningModifier": ("leave_enabled",),
    "ConstantPruningModifier": _SCHEDULE[1:4],
}


class _Fields:
    """The fields of one modifier; errors name both."""

    def __init__(self, modifier: str, values: Any) -> None:
        if values is not None and not isinstance(values, dict):
            raise ValueError(f"{modifier} takes a mapping of fields, got {values!r}.")
        # null means absent; saved recipes also hold a modifier's internal state, in names that end in an underscore
        self.modifier = modifier
        self.values = {str(k): v for k, v in (values or {}).items() if v is not None and not str(k).endswith("_")}
        known = [*_HONOURED[modifier], *_WITHOUT_EFFECT[modifier], "index", "group"]
        known += _SCHEDULE if modifier == "MagnitudePruningModifier" else ()
        for field in self.values:
            if field not in known:
                hint = did_you_mean(field, known) or f" There are {', '.join(known)}."
                raise ValueError(f"{modifier} has no field {field!r} that sparse-train knows.{hint}")
        if "percdamp" in self.values:  # its name in sparseml, from which many published recipes come
            if "dampening_frac" in self.values:
                raise self.error("percdamp", "is the former name of dampening_frac; give one of them")
            self.values["dampening_frac"] = self.values.pop("percdamp")

    def error(self, field: str, message: object) -> ValueError:
        return ValueError(f"{self.modifier}.{field} {message}.")

    def number(self, field: str, value: Any) -> float:
        try:
            return float("a switch" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            hint = "; eval(...) is not evaluated, write its value" if "eval(" in str(value) else ""
            raise self.error(field, f"must be a number, got {value!r}{hint}") from None

    def switch(self, field: str) -> bool:
        value = self.values.get(field, False)
        if not isinstance(value, bool):
            raise self.error(field, f"must be true or false, got {value!r}")
        return value

    def names(self, field: str, default: list[str]) -> list[str]:
        value = self.values.get(field, default)
        if field == "targets" and isinstance(value, str):  # as in llm-compressor, where ignore must be a list
            return [value]
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise self.error(field, f"must be a list of names, such as [Linear], got {value!r}")
        return value

    def given(self, fields: tuple[str, ...]) -> str:
        return ", ".join(field for field in self.values if field in fields)


def read_recipe(path: str | Path) -> Recipe:
    """Read the pruning modifiers of a YAML (or JSON) recipe of llm-compressor.

    Stages (``*_stage``) hold groups (``*_modifiers``) of modifiers. Groups may also be at the top level, and modifiers
    in a stage, at the top level or in a list. N:M counts N **pruned** in these recipes: 1:4 becomes ``NM(3, 4)``.

    Raises:
        ValueError: no such file, no YAML, no recipe, nothing to prune, or something that has no counterpart here and
            would change the result: other modifiers, other fields, values that contradict each other.
    """
    install()  # mask_structure: 2:4 without quotes
    try:
        tree = get_loader("yaml")(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        hint = " A line with a !!python tag (run_type) can be deleted." if "python/" in str(error) else ""
        raise ValueError(f"{path} is not YAML that can be read safely: {error}.{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}.") from error
    notes: list[str] = []
    found = [_Fields(name, values) for name, values in _modifiers(tree, str(path), notes)]
    names = [fields.modifier for fields in found]
    if not found:
        raise ValueError(f"{path} has no modifiers. A recipe looks like {_EXAMPLE}.")
    if set(names) == {"ConstantPruningModifier"}:
        raise ValueError(
            f"{path} has nothing to prune in one shot: ConstantPruningModifier keeps existing zeros while a model is "
            f"trained; {_TRAINING}."
        )
    stages = []
    for index, fields in enumerate(found):
        if fields.modifier != "ConstantPruningModifier":
            stages.append(_stage(fields, "ConstantPruningModifier" in names[:index], notes))
        elif "SparseGPTModifier" not in names[index:]:
            notes.append(
                "ConstantPruningModifier changes nothing in one shot, where zeros have the lowest scores and stay; "
                f"{_TRAINING}."
            )
    return Recipe(stages, notes)


def nm_of_pruned(word: str) -> NM:
    """The pattern of an "N:M" that counts N **pruned**, as in llm-compressor and the scripts of Wanda and SparseGPT."""
    match = re.fullmatch(r"(\d+):(\d+)", word)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f'must be "unstructured" or "N:M" with N pruned of every M, 0 < N < M, got {word!r}')
    return NM(int(match[2]) - int(match[1]), int(match[2]))


def _modifiers(tree: Any, where: str, notes: list[str]) -> Iterator[tuple[str, Any]]:
    """Names and fields of the modifiers in a recipe, a stage or a group, in order."""
    parts = tree if isinstance(tree, list) else [tree]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{where} must map names to modifiers, as in {_EXAMPLE}, got {tree!r}.")
    for key, value in (pair for part in parts for pair in part.items()):
        name = str(key)
        if name in _HONOURED:
            yield name, value
        elif name.endswith("Modifier") and _QUANTIZES.search(name):
            raise ValueError(f"{where}: sparse-train prunes and does not quantize. Remove {name} from the recipe.")
        elif name == "modifiers" or name.endswith(("_modifiers", "_stage")):
            yield from _modifiers({} if value is None else value, name, notes)
        elif name in ("args", "run_type"):
            notes.append(f"{where}: {name} has no counterpart in sparse-train and changes no result.")
        else:
            raise ValueError(
                f"{where}: {name!r} is not a stage (..._stage), no group (..._modifiers) and none of the modifiers "
                f"{', '.join(_HONOURED)}." + did_you_mean(name, _HONOURED)
            )


def _stage(fields: _Fields, keep_zeros: bool, notes: list[str]) -> Stage:
    name = fields.modifier
    criterion: Criterion | Solver = Wanda()
    group: Group = Wanda.group
    if name == "MagnitudePruningModifier":
        criterion, group = Magnitude(), "model" if fields.switch("apply_globally") else "layer"
    elif name == "SparseGPTModifier":
        criterion, group = _sparsegpt(fields), SparseGPT.group
        if keep_zeros and "preserve_sparsity_mask" not in fields.values:
            criterion = replace(criterion, preserve_sparsity_mask=True)
            notes.append(
                "ConstantPruningModifier: existing zeros stay, by preserve_sparsity_mask: true in the "
                f"SparseGPTModifier after it; {_TRAINING}."
            )
    pattern = _pattern(fields, group)
    if isinstance(criterion, Solver):
        criterion.check_pattern(pattern)
    sparsity, allocation = _sparsity(fields, pattern, notes)
    targets, ignore = fields.names("targets", ["Linear"]), fields.names("ignore", [])
    if {"Linear", *_ALL} & set(targets) and not any("lm_head" in item for item in ignore):
        notes.append(f'{name}.targets includes the lm_head, as there; ignore: ["re:.*lm_head"] leaves it dense.')
    if name == "MagnitudePruningModifier" and (given := fields.given(_SCHEDULE)):
        notes.append(
            f"{name}.{given}: one shot prunes to final_sparsity at once; in training it is "
            "DynamicPruning(schedule=Cubic(...))."
        )
    if given := fields.given(_WITHOUT_EFFECT[name]):
        notes.append(f"{name}.{given} has no counterpart in sparse-train and changes no result.")
    return Stage(criterion, pattern, sparsity, allocation, [_target(item) for item in targets], ignore)


def _sparsegpt(fields: _Fields) -> SparseGPT:
    if fields.switch("quantize"):
        raise fields.error("quantize", "has no counterpart: sparse-train prunes and does not quantize. Remove it")
    block_size = fields.number("block_size", fields.values.get("block_size", SparseGPT.block_size))
    if block_size % 1:
        raise fields.error("block_size", f"must be a whole number, got {block_size}")
    damping = fields.number("dampening_frac", fields.values.get("dampening_frac", SparseGPT.dampening_frac))
    return SparseGPT(int(block_size), damping, fields.switch("preserve_sparsity_mask"))


def _pattern(fields: _Fields, group: Group) -> Pattern:
    word = str(fields.values.get("mask_structure", "unstructured"))
    if word in ("unstructured", "0:0"):
        return Unstructured(group)
    try:
        return nm_of_pruned(word)
    except ValueError as error:
        raise fields.error("mask_structure", error) from error


def _sparsity(fields: _Fields, pattern: Pattern, notes: list[str]) -> tuple[float | None, Allocation | None]:
    level = "final_sparsity" if fields.modifier == "MagnitudePruningModifier" else "sparsity"
    value, owl = fields.values.get(level), _owl(fields)
    listed = value if isinstance(value, list) else [] if value is None else [value]
    numbers = [fields.number(level, number) for number in listed]
    for number in numbers:
        check_sparsity(f"{fields.modifier}.{level}", number)
        # with N:M it changes nothing in llm-compressor; 0.33 for 1:3 is not a contradiction
        if isinstance(pattern, NM) and abs(number - pattern.sparsity) > 0.01:
            word = f"{pattern.m - pattern.n}:{pattern.m}"
            raise fields.error(
                level,
                f"is {number:g}, in conflict with mask_structure {word}, N pruned of every M: {pattern.sparsity:g}. "
                f"Leave {level} out, or change one of them",
            )
    if isinstance(pattern, NM):
        if owl:
            notes.append(f"{fields.modifier}.sparsity_profile: N:M has one sparsity in every layer, as there.")
        return None, None
    if not numbers:
        raise fields.error(level, "is missing: the share of weights that are zero, such as 0.5")
    if not isinstance(value, list):
        return numbers[0], owl
    if owl or level == "final_sparsity":
        raise fields.error(level, f"must be one number{' with sparsity_profile: owl' if owl else ''}, got {value}")
    return None, PerBlock(numbers)


def _owl(fields: _Fields) -> OWL | None:
    wanted = ("sparsity_profile", "owl_m", "owl_lmbda")
    missing = [field for field in wanted if field not in fields.values]
    if len(missing) == len(wanted):
        return None
    if missing:
        raise fields.error(missing[0], f"is missing: all of {', '.join(wanted)} go together, such as owl, 5 and 0.08")
    if str(profile := fields.values["sparsity_profile"]).lower() != "owl":
        raise fields.error("sparsity_profile", f"must be owl, got {profile!r}")
    return OWL(*(fields.number(field, fields.values[field]) for field in wanted[1:]))


def _target(item: str) -> str:
    """A target for ``sparse_train.targets.select``, where expressions match only names of linear layers."""
    if item in _ALL:
        return "Linear"
    if not item.startswith("re:"):
        return item.removesuffix(".weight")
    # llm-compressor's also match parameters, "re:.*q_proj.weight", and modules around layers, "re:model.layers.\d+$"
    item = re.sub(r"(?:\\?\.|(?<=[*+]))weight\$?$", "", item)
    return re.sub(r"(?<!\\)\$", r"(?:\\.|$)", item)
