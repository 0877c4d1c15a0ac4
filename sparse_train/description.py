"""``describe``: what a part of a run is, in words that are the same in each process."""


def describe(part: object) -> str:
    """A criterion, schedule, policy or solver in words; without an address, also where its class is no dataclass."""
    if type(part).__repr__ is not object.__repr__:
        return repr(part)
    return f"{type(part).__name__}({', '.join(f'{name}={each!r}' for name, each in sorted(vars(part).items()))})"
