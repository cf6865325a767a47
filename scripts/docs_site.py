"""Hooks of mkdocs.yml: pages made from README.md, CONTRIBUTING.md, the notebook and conf/."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from jepa.config.catalogue import COMPARISONS, EXPERIMENTS, GLOBAL_GROUPS, Catalogue, Choice
from jepa.config.files import read_yaml
from jepa.config.schema import show_value

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
REFERENCE = "reference"
"""Folder of the pages made from conf/, and the entry of the navigation that they replace."""
ITEM = re.compile(r" *(?:[-*] |\d+\. )")


def on_config(config: MkDocsConfig) -> None:
    """Put the pages of the configuration reference into the navigation."""
    for section in config.nav or []:
        if REFERENCE in section:
            (title,) = section
            section["Configuration"] = [
                {"Commands": f"{title}/commands.md"},
                *({group: f"{title}/{page_name(group)}"} for group in groups()),
            ]
            del section[title]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links to conf/, the README and the notebook lead to their pages; lists and tables begin after an empty line."""
    markdown = re.sub(r"\]\(\.\./\.\./conf/(\w+)\)", rf"](../{REFERENCE}/\1.md)", markdown)
    markdown = markdown.replace("](../../README.md", "](../index.md")
    if page.file.src_uri != "quickstart.md":
        markdown = markdown.replace("quickstart.ipynb)", "quickstart.md)")
    lines, is_code = [""], False
    for line in markdown.splitlines():
        is_code ^= line.lstrip().startswith("```")
        before = lines[-1]
        begins_list = ITEM.match(line) and not ITEM.match(before) and not before.startswith(" ")
        begins_table = line.startswith("|") and not before.startswith("|")
        if not is_code and before and (begins_list or begins_table):
            lines.append("")
        lines.append(line)
    return "\n".join(lines[1:])


def pages() -> dict[str, str]:
    """Path in the site -> Markdown of all pages that are no files of docs/."""
    readme = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text())
    return {
        "index.md": readme,
        "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "quickstart.md": "\n\n".join(cells()),
        f"{REFERENCE}/commands.md": "\n".join(commands()),
        **{f"{REFERENCE}/{page_name(group)}": "\n".join(reference(group)) for group in groups()},
    }


def cells() -> Iterator[str]:
    """The cells of the notebook as Markdown."""
    for cell in json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())["cells"]:
        text = "".join(cell["source"])
        yield f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
    yield "This page is a notebook: [quickstart.ipynb](quickstart.ipynb)."


def groups() -> dict[str, dict[str, Choice]]:
    files = sorted((CONF / COMPARISONS).glob("*.yaml"))
    comparisons = {path.stem: Choice(COMPARISONS, path.stem, path) for path in files}
    return dict(sorted({**Catalogue([CONF]).groups, COMPARISONS: comparisons}.items()))


def page_name(group: str) -> str:
    return f"{group.replace('/', '-')}.md"


def commands() -> Iterator[str]:
    """The keys that commands have whatever is chosen, and the groups that they choose from."""
    yield "# Commands\n\nWhat each command takes, with its defaults. `--help` prints the same in a terminal.\n"
    for path in sorted(CONF.glob("*.yaml")):
        yield f"## jepa-{path.stem}\n"
        if chosen := list(defaults(path)):
            links = (f"[{group}]({page_name(group)})={choice}" for group, choice in chosen)
            yield f"Groups and their defaults: {', '.join(links)}\n"
        yield from table(Choice("", path.stem, path))


def defaults(path: Path) -> Iterator[tuple[str, str]]:
    """(group, choice) of the list of defaults of a command."""
    for entry in read_yaml(path, aliases=True).get("defaults", []):
        if isinstance(entry, dict):
            ((group, choice),) = entry.items()
            yield group.removeprefix("override ").strip("/"), show_value(choice)


def reference(group: str) -> Iterator[str]:
    """The choices of a group with their keys; of those that set keys of other groups the whole file."""
    yield f"# {group}\n"
    for name, choice in groups()[group].items():
        yield f"## {group}={name}\n\n{description(choice)}\n"
        if group in GLOBAL_GROUPS | {*EXPERIMENTS}:
            body = re.sub(r"\A(?:#.*\n|\n)+", "", choice.text)
            yield f"```yaml\n{body.rstrip()}\n```\n"
        else:
            yield from table(choice)


def description(choice: Choice) -> str:
    """The comment at the head of a file, its commands as code."""
    head = re.match(r"(?:#.*\n|\n)*", choice.text)
    lines = [line.lstrip("#").strip() for line in (head[0] if head else "").splitlines()]
    lines = [line for line in lines if not line.startswith("@package")]
    return "\n".join(f"\n    {line}\n" if line.startswith("jepa-") else escape(line) for line in lines)


def table(choice: Choice) -> Iterator[str]:
    values = {key: value for key, value in choice.values.items() if not key.endswith("_target_")}
    values = {key: value for key, value in values.items() if choice.group or not key.startswith("hydra")}
    if values:
        yield "| key | default | what it is |\n|---|---|---|"
        for key, value in values.items():
            comment = choice.comments.get(key) or choice.comments.get(key.rpartition(".")[0], "")  # or of the section
            yield f"| `{key}` | {code(show_value(value))} | {escape(comment)} |"
        yield ""


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def escape(text: str) -> str:
    return re.sub(r"([\\*_\[\]`|])", r"\\\1", html.escape(text, quote=False))
