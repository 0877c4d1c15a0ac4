"""Devices by the names that users give."""


def chosen_device(device: str | None) -> str:
    """The device that a command computes on: the one that was named; otherwise a GPU if there is one.

    Raises:
        ValueError: torch cannot compute there.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device names a device of torch, such as cpu or cuda, got {device!r}.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"There is no GPU that this torch can use, so device={device!r} is not available. Use cpu.")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # as on mps elsewhere, and on meta
        raise ValueError(f"torch cannot compute on device={device!r} here ({error}). Use cpu.") from error
    return device
