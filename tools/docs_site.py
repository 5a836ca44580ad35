"""What MkDocs does beyond docs/: pages of the repository outside it, and links to them.

A page in docs/ links to a file of the repository as GitHub does, `../benchmarks/README.md`. On the
site some of these files are pages too; a link to any other file becomes its text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
#: Files outside docs/ that the site has, at their paths in the repository.
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/results/*.md")
PICTURES = ("benchmarks/results/*.svg",)
#: Pages whose tables need the width.
WIDE = ("variants.md", "algorithms.md", "benchmarks.md")
# The third column has calls of a hundred characters, the last one sentences.
_WIDE_CALLS = """
<style>
.md-typeset td:nth-child(3) { min-width: 20rem; }
.md-typeset td:nth-child(7):not(:empty) { min-width: 9rem; }
</style>
"""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def added() -> list[str]:
    """Paths in the repository of the files that the site has besides docs/."""
    found = (file for pattern in PAGES + PICTURES for file in sorted(ROOT.glob(pattern)))
    return [file.relative_to(ROOT).as_posix() for file in found]


def site_link(page: str, target: str) -> str | None:
    """A link of a page, path in the repository, as the site has it; None where it has no such file.

    docs/ is the root of the site; the files of `added` lie at their own paths below it.
    """
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", target):
        return target
    found = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    if found.startswith("docs/"):
        found = found.removeprefix("docs/")
    elif found == "README.md":
        found = "index.md"
    elif found not in added():
        return None
    start = posixpath.dirname(page.removeprefix("docs/"))
    return posixpath.relpath(found, start or ".") + (f"#{anchor}" if anchor else "")


def on_files(files: Any, config: Any) -> Any:
    # Here, so that the tests can ask about links where MkDocs is not installed.
    from mkdocs.structure.files import File

    for path in added():
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = page.file.src_uri
    name = source if source in added() else f"docs/{source}"

    def linked(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        found = site_link(name, target)
        return text if found is None else f"{picture}[{text}]({found})"

    if source in WIDE or source.startswith("benchmarks/results/"):
        # Its tables take the place of the table of contents.
        page.meta["hide"] = ["toc"]
        markdown += _WIDE_CALLS if source == "variants.md" else ""
    # Code is left as it is: an index followed by a call looks like a link.
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if p.startswith("`") else _LINK.sub(linked, p) for p in parts)
