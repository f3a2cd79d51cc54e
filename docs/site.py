"""MkDocs hook: pages of the site are the repository's own files, at their own paths.

So a relative link is right on the site if it is right in the repository. Files that pages link to (pictures, records,
sources) are copied along.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(([^)#\s]+)")


def pages(nav: list[Any]) -> list[str]:
    """Paths of the pages in ``nav``."""
    found: list[str] = []
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        found += pages(target) if isinstance(target, list) else [target]
    return found


def on_files(files: Files, config: Any) -> Files:
    """Replace the files of ``docs_dir`` by the pages of the navigation and what they link to."""
    paths = pages(config.nav)
    for page in paths:  # grows while it is read: pages may link to pages outside of the navigation
        for link in LINK.findall((ROOT / page).read_text()) if page.endswith(".md") else []:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
            if "://" not in link and target not in paths and (ROOT / target).is_file():
                paths.append(target)
    theme = [file for file in files if Path(config.docs_dir) not in Path(file.abs_src_path or "/").parents]
    own = [File.generated(config, path, abs_src_path=str(ROOT / path)) for path in paths]
    return Files(theme + own)
