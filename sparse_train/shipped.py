"""Recipes and configs that come with the package, by the names that they have in its repository."""

from importlib import resources
from pathlib import Path


def shipped(path: str) -> str:
    """``path``, or, where no such file is at hand, the packaged one of that name (recipes/..., configs/...)."""
    if not Path(path).exists() and path.startswith(("recipes/", "configs/")):
        packaged = resources.files("sparse_train").joinpath(path)
        if packaged.is_file():
            return str(packaged)
    return path
