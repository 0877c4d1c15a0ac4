"""The pages build as a site that needs nothing from elsewhere, and say what the code says."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from sparse_train import MaskUpdater, PruningConfig
from tests.conftest import VOCABULARY, tiny_llama

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "sparse_train"
ENVIRONMENT = {"NO_MKDOCS_2_WARNING": "1", "REPOSITORY_URL": "https://example.org/someone/sparse-train"}


def build(out: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--config-file={config}", f"--site-dir={out}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr.decode()
    return out


def test_every_page_is_built(site):
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("")
        assert (site / ("" if name.name == "index" else name) / "index.html").is_file(), name


def test_the_site_links_to_the_repository_that_the_environment_names(site):
    assert f'href="{ENVIRONMENT["REPOSITORY_URL"]}"' in (site / "index.html").read_text()


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe|object)\b[^>]*>", page.read_text())
        assert tags
        assert not [tag for tag in tags if re.search(r"""(?:src|href|data)=["']?(?:https?:)?//""", tag)], page


def test_the_reference_is_made_from_docstrings(site):
    page = (site / "api" / "callbacks" / "index.html").read_text()
    assert "Keep a model at its target sparsity in training" in page
    assert "<p>::</p>" not in page


def test_an_option_stays_in_one_piece_where_commands_wrap(site):
    page = (site / "index.html").read_text()
    assert '<span class="option">--export</span>' in page
    (style,) = re.findall(r'href="(wrap\.css)"', page)
    assert ".option" in (site / style).read_text()


def test_a_broken_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "hooks.py", tmp_path / "docs")
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)")
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"^nav:\n(?:  .*\n)+", "", config, flags=re.M))
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert b"gone.md" in done.stderr


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("sparse_train", "sparse_train"),
        ("callbacks", "sparse_train.callbacks"),
        ("around", "sparse_train.evaluation"),
    ],
)
def test_public_names_are_in_the_reference(page, module):
    described = re.findall(rf"^::: {re.escape(module)}\.(\w+)$", (DOCS / "api" / f"{page}.md").read_text(), re.M)
    assert sorted(described) == sorted(importlib.import_module(module).__all__)


def test_what_pages_import_is_in_the_reference():
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    imported = set()
    text = "\n".join(page.read_text() for page in pages)
    for module, names in re.findall(r"^from (sparse_train[\w.]*) import ([\w, ]+)", text, re.M):
        imported |= {f"{module}.{name.strip()}" for name in names.split(",")}
    described = re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    assert len(imported) > 15
    assert imported <= set(described)


def section(page: str, title: str) -> str:
    """The text of a page under a heading of the second level."""
    return (DOCS / page).read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_module_has_its_place_in_the_overview():
    overview = section("contributing.md", "Where things are")
    for path in PACKAGE.iterdir():
        if path.is_symlink() or path.name in ("__init__.py", "__pycache__", "py.typed"):
            continue
        assert (f"`{path.name}/`" if path.is_dir() else f"`{path.name}`") in overview, path.name


def called() -> list[tuple[str, str]]:
    """Functions of the package with their files, as a recorded step and the update after it call them."""
    model, found = tiny_llama(), []
    updater = MaskUpdater(model, "2:4", update_freq=2, window=1, total_steps=8)
    optimizer = torch.optim.AdamW(model.parameters())

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}{os.sep}"):
            file = Path(frame.f_code.co_filename).relative_to(PACKAGE)
            found.append((frame.f_code.co_qualname, file.as_posix()))

    for step in range(1, 4):  # the first mask comes after step 1, an update after step 3
        sys.setprofile(note if step == 3 else None)
        try:
            model(input_ids=torch.randint(3, VOCABULARY, (2, 8))).logits.square().mean().backward()
            optimizer.step()
            report = updater.step()
        finally:
            sys.setprofile(None)
    assert report is not None and report.step == 3
    return found


def test_the_way_of_an_activation_is_the_way_it_takes():
    page = section("how_it_works.md", "The way of an activation")
    listed = re.findall(r"^\| \d+ \| `([\w.]+)` \| `([\w/.]+)` \|", page, re.M)
    assert len(listed) > 20
    calls = iter(called())
    for each in listed:
        assert each in calls, each  # after the one before: looking for it takes from the iterator


def test_the_way_of_a_weight_names_functions_that_there_are():
    page = section("how_it_works.md", "The way of a weight")
    listed = re.findall(r"^\| \d+ \| `([\w.]+)`.*? \| `([\w/.]+)` \|", page, re.M)
    assert len(listed) > 7
    for function, file in listed:
        assert f"def {function.rpartition('.')[2]}(" in (PACKAGE / file).read_text(), function


def test_promises_name_tests_that_there_are():
    promises = re.findall(r"^\| [A-Z].*", (DOCS / "reliability.md").read_text(), re.M)
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)`", promise)
        assert named and all((ROOT / name).is_file() for name in named), promise


def test_the_page_of_recipes_is_up_to_date():
    sys.path.insert(0, str(DOCS))
    import recipe_page

    page = recipe_page.page()
    assert (DOCS / "recipes.md").read_text() == page, "python docs/recipe_page.py --write"
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "configs").rglob("*.yaml")]:
        assert f"### {path.relative_to(ROOT)}\n" in page


def test_the_choice_rests_on_measured_numbers():
    numbers = re.compile(r"\b\d+\.\d\d\b")
    chosen = set(numbers.findall((DOCS / "choosing.md").read_text()))
    assert len(chosen) >= 15
    measured = (DOCS / "results.md").read_text() + (DOCS / "more_results.md").read_text()
    assert chosen <= set(numbers.findall(measured))


def test_the_table_of_settings_has_all_of_them_with_their_defaults():
    page = (DOCS / "settings.md").read_text()
    rows = page.partition("\n| setting ")[2].partition("\n\n")[0]
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", rows, re.M))
    config = PruningConfig()
    own = {each.name: getattr(config, each.name) for each in fields(config) if each.init}
    plain = {name: value is None or isinstance(value, (str, int, float, tuple)) for name, value in own.items()}
    calls = {name: repr(value) if plain[name] else f"{type(value).__name__}()" for name, value in own.items()}
    assert table == {name: call.replace("'", '"') for name, call in calls.items()}
