"""Pages that the site has beside the Markdown files of docs/, and a check of what it loads.

The front page is README.md, `contributing.md` is CONTRIBUTING.md, the page of all settings comes
from the config dataclasses (`config_reference.py`), and each notebook becomes a page of its text
and code. MkDocs calls the functions whose names begin with `on_`.
"""

import json
import re
from pathlib import Path
from typing import Any

import config_reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NOTEBOOKS = "notebooks"
STYLE = ".md-grid { max-width: 80rem; }"
"""Wider pages than Material's: tables and diagrams of 100 columns fit."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    made = {
        "index.md": from_top((ROOT / "README.md").read_text()),
        "contributing.md": from_top((ROOT / "CONTRIBUTING.md").read_text()),
        config_reference.PAGE: config_reference.page(),
        "style.css": STYLE,
    }
    for path in (ROOT / "docs" / NOTEBOOKS).glob("*.ipynb"):
        made[f"{NOTEBOOKS}/{path.stem}.md"] = notebook_page(json.loads(path.read_text()), path.name)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to a notebook lead to its page, except from that page itself."""
    if page.file.src_uri.startswith(NOTEBOOKS):
        return markdown
    return re.sub(rf"\((\.\./)?{NOTEBOOKS}/(\w+)\.ipynb\)", rf"(\1{NOTEBOOKS}/\2.md)", markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that a browser completes from other hosts."""
    found = loaded_from_elsewhere(output)
    if found:
        raise PluginError(f"{page.file.src_uri} must load nothing from other hosts, got {found}")
    return output


def from_top(text: str) -> str:
    """The Markdown of a file at the top of the repository, with the links of a page of the site."""
    text = text.replace("(CONTRIBUTING.md)", "(contributing.md)")
    return re.sub(r"\]\(docs/", "](", text)


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """The Markdown of a notebook: its text, and its code as blocks."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    heading, *rest = parts
    return "\n\n".join([heading, f"This page is a notebook: [{name}]({name}).", *rest]) + "\n"


def loaded_from_elsewhere(html: str) -> list[str]:
    """Addresses on other hosts that a page loads: scripts, styles, fonts, images, frames."""
    tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", html)
    return [
        url
        for tag in tags
        for url in re.findall(r"""(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""", tag)
    ]
