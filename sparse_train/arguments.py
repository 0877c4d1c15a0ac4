"""``expect``: arguments that are objects, or nothing. ``plain``: numbers that are Python's."""

from typing import Any, TypeVar

T = TypeVar("T")


def plain(value: Any) -> Any:
    """The Python number that a numpy scalar or a tensor of one is; anything else as it is.

    Others are numbers of other classes: described in other words, and refused where a checkpoint is loaded.
    """
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def expect(name: str, value: T | None, default: T, base: type[Any] | tuple[type[Any], ...]) -> T:
    """``value``, or ``default`` for None; ValueError where it is a class, a text, or anything but a ``base``."""
    if value is None:
        return default
    given: T = value
    if not isinstance(value, base):
        way_out = f" Write {value.__name__}()." if isinstance(value, type) and issubclass(value, base) else ""
        raise ValueError(f"{name} is an object such as {default!r}, got {value!r}.{way_out}")
    return given
