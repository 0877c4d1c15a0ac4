"""``describe``: a part of a run in words that are the same in each process."""

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from sparse_train.arguments import to_python_number


def describe(part: Any) -> str:
    """A criterion, schedule, policy or solver in words: its class, and the arguments that are not the defaults.

    Never contains a memory address, even if the class is not a dataclass.
    """
    if is_dataclass(part):
        own = {field.name: to_python_number(getattr(part, field.name)) for field in fields(part) if field.init}
        default = {field.name: _default(field) for field in fields(part)}
        told = {name: value for name, value in own.items() if repr(value) != repr(default[name])}
        return f"{type(part).__name__}({_arguments(told)})"
    if "__repr__" in {name for cls in type(part).__mro__[:-1] for name in vars(cls)}:
        return repr(part)
    return f"{type(part).__name__}({_arguments(dict(sorted(vars(part).items())))})"


def _arguments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
