"""Hooks of the documentation: tables made from the package, files of the repository included without a copy.

In a page `{{ methods }}` is the table of methods, `{{ arguments CLASS }}` that of the arguments of a class, and
`{{ include PATH }}` or `{{ include PATH#Heading }}` a Markdown file of the repository or one section of it. Links of
the form `[text](repo:PATH)` lead to a file in the repository.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpns_hf.experiments.arguments import DataArguments, ModelArguments, PruneArguments
from vpns_hf.experiments.compare import ComparisonArguments
from vpns_hf.methods import METHODS, Rounds, Stage
from vpns_hf.training import VPNsTrainingArguments

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r"^\{\{ include (\S+?)(?:#(.+?))? \}\}$", re.MULTILINE)
ARGUMENTS = re.compile(r"^\{\{ arguments (\w+) \}\}$", re.MULTILINE)
ARGUMENT_CLASSES = (ModelArguments, DataArguments, PruneArguments, ComparisonArguments, VPNsTrainingArguments)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!?\[[^\]]*\]\([^)]*\))*)\]\(([^)\s]+)\)")
PAPER = re.compile(r"\barXiv\s+(\d{4}\.\d{4,5})(?:, (\d{4}\.\d{4,5}))?")


def on_files(files: Any, config: Any) -> Any:
    """Add every picture of recipes and benchmarks to the site, so that included pages can show it."""
    from mkdocs.structure.files import File

    for folder in ("recipes", "benchmarks", "model_cards"):
        for path in sorted((ROOT / folder).rglob("*.png")):
            name = f"pictures/{path.relative_to(ROOT)}"
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in a page."""
    return fill(markdown, page.file.src_uri, config.repo_url or "")


def fill(markdown: str, page: str, repo_url: str) -> str:
    """Replace the macros and links of a page.

    Args:
        markdown: text of the page.
        page: path of the page below `docs/`.
        repo_url: address of the repository; "": files are named, not linked.

    Raises:
        FileNotFoundError: a file or heading that the page names does not exist.
    """
    text = markdown.replace("{{ methods }}", methods_table())
    text = ARGUMENTS.sub(lambda found: arguments_table(found[1]), text)
    text = INCLUDE.sub(lambda found: included(found[1], found[2]), text)
    return _outside_code(text, lambda found: _own_link(found, page, repo_url))


def _outside_code(text: str, replace: Callable[[re.Match[str]], str]) -> str:
    """Replace the links of a text, but for what looks like one in a block of code."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(replace, part) for part in parts)


def methods_table() -> str:
    """Return a Markdown table of all methods: stages in order, prompt, description with its papers."""
    rows = ["| method | stages | prompt | description |", "|---|---|:---:|---|"]
    for name, method in METHODS.items():
        stages = ", ".join(_stage_name(entry) for entry in method.stages)
        prompt = "yes" if method.uses_prompt else ""
        description = PAPER.sub(_papers, method.description).replace("|", r"\|")
        rows.append(f"| `{name}` | {stages} | {prompt} | {description} |")
    return "\n".join(rows)


def arguments_table(name: str) -> str:
    """Return a Markdown table of the arguments that a class adds to those of its bases.

    Raises:
        StopIteration: there is no such class among `ARGUMENT_CLASSES`.
    """
    cls = next(each for each in ARGUMENT_CLASSES if each.__name__ == name)
    rows = ["| argument | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name in cls.__annotations__:
            text = field.metadata["help"].replace("|", r"\|")
            rows.append(f"| `{field.name}` | {_default(field)} | {text} |")
    return "\n".join(rows)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    return "required" if field.default is dataclasses.MISSING else f"`{field.default}`"


def _stage_name(entry: Stage | Rounds) -> str:
    if isinstance(entry, Rounds):
        return f"{_stage_name(entry.stage)} (several)"
    return entry.name.replace("_", "-")


def _papers(found: re.Match[str]) -> str:
    links = [f"[{number}](https://arxiv.org/abs/{number})" for number in found.groups() if number]
    return f"arXiv {', '.join(links)}"


def included(path: str, heading: str | None = None) -> str:
    """Return a Markdown file of the repository, or one section of it without its heading.

    Raises:
        FileNotFoundError: there is no such file or heading.
    """
    text = (ROOT / path).read_text(encoding="utf-8")
    # The page has a title of its own.
    text = re.sub(r"\A# .*\n", "", text) if heading is None else section(text, heading, path)
    folder = posixpath.dirname(path)
    return _outside_code(text, lambda found: _included_link(found, folder))


def section(text: str, heading: str, path: str) -> str:
    """Return what stands below a heading of the second level.

    Raises:
        FileNotFoundError: there is no such heading.
    """
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise FileNotFoundError(f"{path} has no section {heading!r}.")
    return found[1].strip()


def _included_link(found: re.Match[str], folder: str) -> str:
    """Resolve a link of an included file from the folder of that file."""
    mark, words, target = found.groups()
    words = LINK.sub(lambda inner: _included_link(inner, folder), words)
    if re.match(r"https?:|mailto:|repo:|#", target):
        return f"{mark}[{words}]({target})"
    path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
    return f"{mark}[{words}](repo:{path})"


def _own_link(found: re.Match[str], page: str, repo_url: str) -> str:
    mark, words, target = found.groups()
    words = LINK.sub(lambda inner: _own_link(inner, page, repo_url), words)
    if not target.startswith("repo:"):
        return f"{mark}[{words}]({target})"
    path = target.removeprefix("repo:")
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"docs/{page} links to {path}, which does not exist.")
    if path.startswith("docs/"):
        place = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(page) or ".")
        return f"{mark}[{words}]({place})"
    if mark or path.endswith(".png"):
        return f"{mark}[{words}]({posixpath.relpath(f'pictures/{path}', posixpath.dirname(page) or '.')})"
    if repo_url:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{words}]({repo_url.rstrip('/')}/{kind}/main/{path})"
    names_it = posixpath.basename(words.strip("`")) == posixpath.basename(path)
    return f"`{path}`" if names_it else f"{words} (`{path}`)"
