"""Pages show the pictures of `benchmarks/results`, where the commands write them: on a site they
lie beside the pages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path("benchmarks/results")


def on_files(files: Files, config: Any) -> Files:
    """Add every picture of the results to the site, as `results/NAME`."""
    for picture in sorted((Path(config.config_file_path).parent / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to the results, written as in the repository, find them on the site."""
    return markdown.replace(f"(../{RESULTS}/", "(results/")
