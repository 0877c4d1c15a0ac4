"""Arguments as users write them: checks, their words and data, and suggestions for mistyped ones.

An object becomes data (``as_data``) or a call (``describe``), and data a call (``as_call``).
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

T = TypeVar("T")


def to_python_number(value: Any) -> Any:
    """The Python number for a numpy scalar or a tensor with one element; other values are returned unchanged.

    Numbers of other classes would be described in other words, and refused when a checkpoint is loaded.
    """
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_sparsity(name: str, value: float) -> None:
    """Raise ValueError unless ``0 <= value < 1``."""
    number = to_python_number(value)
    if not isinstance(number, (int, float)):
        raise ValueError(f"{name} is the share of weights that are zero, a number such as 0.5, got {value!r}.")
    if not 0 <= number < 1:
        raise ValueError(
            f"{name} must be at least 0 and below 1 (the share of weights that are zero), got {number}."
            + (f" For {number} % write {number / 100:g}." if 1 < number < 100 else "")
        )


def check_positive(name: str, value: int | None) -> None:
    """Raise ValueError unless ``value`` is at least 1, or None: not given."""
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def require_type(name: str, value: T | None, example: T, base: type[Any] | tuple[type[Any], ...]) -> T:
    """``value``, or ``example`` in place of None; ValueError if it is a class, a text, or anything but a ``base``."""
    if value is None:
        return example
    if not isinstance(value, base):
        way_out = getattr(value, "way_out", "")
        way_out = f" Write {value.__name__}()." if isinstance(value, type) and issubclass(value, base) else way_out
        raise ValueError(f"{name} is an object such as {example!r}, got {value!r}.{way_out}")
    return value


def describe(part: Any) -> str:
    """A criterion, schedule, policy or solver in words, never with a memory address: the same in each process."""
    if any("__repr__" in vars(cls) for cls in type(part).__mro__[:-1]):
        return repr(part)
    return f"{type(part).__name__}({', '.join(f'{name}={value!r}' for name, value in sorted(vars(part).items()))})"


def as_data(part: Any) -> Any:
    """An argument as plain data: the class of an object, and its arguments."""
    if is_dataclass(part) and not isinstance(part, type):
        own = {each.name: as_data(getattr(part, each.name)) for each in fields(part) if each.init}
        return {"class": type(part).__name__, **own}
    if isinstance(part, Mapping):
        return {key: as_data(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [as_data(value) for value in part]
    part = to_python_number(part)
    return part if part is None or isinstance(part, (str, int, float)) else describe(part)


def as_call(data: Any) -> str:
    """Plain data of an object (``as_data``) as the call that makes it; other data as it is."""
    if not isinstance(data, Mapping) or "class" not in data:
        return str(data)
    arguments = ", ".join(f"{name}={as_call(value)}" for name, value in data.items() if name != "class")
    return f"{data['class']}({arguments})"


def named(text: str, names: Collection[str]) -> list[str]:
    """Those of the names, with dots, that a user means by a text.

    It is a name or the beginning of one ("model.layers.0"), or else a part between dots ("down_proj", "self_attn",
    "mlp.down_proj"): "model.layers" is not "teacher.model.layers", too. A last name alone ("fc") is all that are named
    so, as in peft. Or it is "re:" and a regular expression matched from the start (as in llm-compressor); ValueError if
    that is none.
    """
    if not text.startswith("re:"):
        begun = [name for name in names if _between_dots(name).startswith(_between_dots(text))]
        is_last = text in names and text.isidentifier()  # "0", of a Sequential, is one layer
        return begun if begun and not is_last else [n for n in names if _between_dots(text) in _between_dots(n)]
    try:
        matches, own = re.compile(text.removeprefix("re:")).match, "base_layer" in text  # of peft, in its wrapper
        return [name for name in names if matches(name if own else name.removesuffix(".base_layer"))]
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}.") from error


def _between_dots(name: str) -> str:
    return f".{name}.".replace("[", ".[")  # the number of a fused expert is a part of its own


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """ " Did you mean ...?" or nothing, to append to an error."""
    known = {each.lower(): each for each in candidates}
    close = [known[each] for each in difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.5)]
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def leave_out(names: Iterable[str]) -> str:
    """How to leave out layers, and all others with the same last names."""
    lasts = {name: name.removesuffix(".base_layer").rpartition(".")[2] for name in names}  # peft's layer in its own
    kinds = dict.fromkeys(name if last.isdigit() else last for name, last in lasts.items())  # "0" says nothing
    return f"All that are named alike are left out by ignore={list(kinds)}."
