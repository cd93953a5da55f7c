"""For MkDocs: the committed reports of benchmarks/results, with their plots, as pages under results/."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(RESULTS.rglob("*.md")) + sorted(RESULTS.rglob("*.png")):
        page = Path("results") / path.relative_to(RESULTS)
        files.append(File.generated(config, page.as_posix(), abs_src_path=str(path)))
    return files
