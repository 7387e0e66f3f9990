"""The pages name files and rooms: they are those of the package."""

import re
from pathlib import Path

import pytest
import test_layers

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *(ROOT / "docs").glob("*.md")]
# Folders of the reader's and of a run's.
OUTSIDE = {"photos", "shop", "query", "gallery", "anchor", "positive", "train", "test", "report"}
# Where a page may start a path from.
FROM = ("", "siamese_jax")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in linked if not (page.parent / link).exists()]
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|\.png|/))`", text)
    named = [name for name in named if "NAME" not in name and name.split("/")[0] not in OUTSIDE]
    assert not [name for name in named if not any((ROOT / f / name).exists() for f in FROM)]


def test_the_rooms_of_the_architecture_are_those_of_the_package():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    picture = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert re.findall(r'class="chiptext"[^>]*>(\w+)<', picture) == told
    held = [room for room in test_layers.ROOMS if "." not in room and room != "__main__"]
    assert told == held
