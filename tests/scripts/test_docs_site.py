"""The documentation site is built without network, and knows every key; the notebook runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import pytest
import yaml

import jepa

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_NETWORK = """
import os, socket, sys
def refuse(*_, **__):
    os.write(2, b"asked for the network")
    os._exit(9)
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_NETWORK, "build", "-f", str(config), "-d", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    result = build(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r"<(?:link|script|img|iframe)\b[^>]*(?:href|src)=[\"']?(?:https?:)?//[^>]*>|url\(['\"]?https?:")
    texts = {path: path.read_text() for path in [*pages, *site.rglob("*.css")]}
    assert not {path.name: found for path, text in texts.items() if (found := loaded.findall(text))}


def leaves(node: object, key: str) -> Iterator[tuple[str, object]]:
    """(dotted key, value) of every leaf."""
    if not isinstance(node, dict) or not node:
        yield key, node
        return
    for name, inner in node.items():
        yield from leaves(inner, f"{key}.{name}".strip("."))


@pytest.mark.slow
def test_reference_has_every_choice_and_every_key_with_its_default_and_comment(site: Path) -> None:
    for path in (ROOT / "conf").glob("*/**/*.yaml"):
        group = path.parent.relative_to(ROOT / "conf").as_posix()
        page = (site / "reference" / f"{group.replace('/', '-')}.html").read_text()
        assert f">{group}={path.stem}<" in page
        if group in ("dataset", "encoder"):
            section = unescape(page.partition(f">{group}={path.stem}<")[2].partition("<h2")[0])
            is_global = "@package _global_" in path.read_text()
            for key, value in leaves(yaml.safe_load(path.read_text()), "" if is_global else group):
                if "_target_" not in key:
                    assert f"<code>{key}</code>" in section, path
                    assert not isinstance(value, str) or value in section, path
            for comment in re.findall(r"^\w.*? # (\w[\w ,]+)", path.read_text(), re.MULTILINE):
                assert comment in section, path
    commands = (site / "reference" / "commands.html").read_text()
    assert "from the newest whole one before it" in commands  # the second line of a comment


@pytest.mark.slow
def test_api_page_has_every_public_name(site: Path) -> None:
    ids = re.findall(r'id="jepa\.([\w.]+)"', (site / "api.html").read_text())
    names = {name.rpartition(".")[2] for name in ids}
    assert {*jepa.__all__, "as_swm", "FeaturesExtractor", "encode", "evaluate"} - {"__version__"} <= names


@pytest.mark.slow
def test_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n")
    settings = re.sub(r"(?ms)^(?:hooks|nav|plugins):.*?(?=^\w|\Z)", "", (ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(settings)
    result = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert result.returncode == 1
    assert "gone.md" in result.stderr


@pytest.mark.slow
def test_cells_of_the_notebook_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for cell in json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]:
        assert cell.get("outputs", []) == []
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("steps = 40", "steps = 4"), names)
    assert os.path.isfile("features.npz")
    assert os.path.isfile("outputs/notebook/report.html")
