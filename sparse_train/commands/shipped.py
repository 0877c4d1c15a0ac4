"""Recipes and configs that come with the package, by their names in the repository."""

from importlib import resources
from pathlib import Path


def shipped(path: str) -> str:
    """``path``, or, if there is no such file, the packaged file of that name (recipes/..., configs/...)."""
    if not Path(path).exists() and path.startswith(("recipes/", "configs/")):
        packaged = resources.files("sparse_train").joinpath(path)
        if packaged.is_file():
            return str(packaged)
    return path


def shipped_names() -> list[str]:
    """The names of all packaged recipes and configs."""
    root = Path(str(resources.files("sparse_train")))
    folders = (root / "recipes", root / "configs")
    return sorted(path.relative_to(root).as_posix() for folder in folders for path in folder.rglob("*.yaml"))
