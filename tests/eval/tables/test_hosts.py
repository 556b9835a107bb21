import pytest

from eval.tables.hosts import PAGE, refused_table, rewrite_page, served_table
from hf_crouter.errors import InputError
from hf_crouter.hosts.families import FAMILIES


def test_the_page_shows_the_list():
    text = PAGE.read_text(encoding="utf-8")
    assert rewrite_page(text) == text, "stale; run python -m eval.tables"
    for family in FAMILIES.values():
        assert f"| {family.name} |" in text and family.refused in text


def test_every_family_stands_in_one_table():
    assert len(served_table()) + len(refused_table()) == len(FAMILIES) + 4


@pytest.mark.parametrize("text", ["", "<!-- families: served -->\n<!-- end -->", "<!-- families: served -->"])
def test_markers_that_are_missing(text):
    with pytest.raises(InputError, match="expected <!-- families"):
        rewrite_page(text)
