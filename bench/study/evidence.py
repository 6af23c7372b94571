"""Renew the tables of docs/evidence.md from those beside the results.

    python bench/study/evidence.py

Between `<!-- FILE -->` and `<!-- end -->` the page has the tables of bench/results/FILE, without
its title and its line on how it was made: no number in them is typed.
"""

from __future__ import annotations

import re
from pathlib import Path

from cells import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
_PART = re.compile(r"(<!-- (\S+\.md) -->\n).*?(<!-- end -->)", re.DOTALL)


def renewed(page: str, results: Path) -> str:
    """The page with the tables of the files in a folder; "not measured yet" of those not there."""

    def table(part: re.Match[str]) -> str:
        file = results / part[2]
        text = "*Not measured yet.*"
        if file.is_file():
            text = file.read_text("utf-8").split("\n\n", 2)[2].strip().replace("\n## ", "\n### ")
            text = re.sub(r"^## ", "### ", text)
        return f"{part[1]}{text}\n{part[3]}"

    return _PART.sub(table, page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8"), RESULTS.parent), "utf-8")
