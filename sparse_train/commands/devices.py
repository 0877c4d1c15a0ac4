"""Devices as users name them."""


def check_device(device: str) -> None:
    """Raise ValueError unless torch can compute there."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device names a device of torch, such as cpu or cuda, got {device!r}.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"There is no GPU that this torch can use, so device={device!r} is not available. Use cpu.")
