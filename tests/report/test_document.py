"""A document in the terminal, in a page and as an image."""

import re
from html.parser import HTMLParser

import matplotlib
import pytest

from bolza.report import Document, Table, page, to_html, to_png, to_svg, to_text

VOID = {"meta", "br", "hr", "img", "link", "input"}


class _Reader(HTMLParser):
    """Collects what a checker needs, and fails on tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.ids, self.targets = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        for name in ("src", "href", "xlink:href", "data"):
            if name in attrs:
                self.targets.append(attrs[name])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture
def read(document):
    reader = _Reader()
    reader.feed(page(document))
    assert reader.open == []
    return reader


def test_the_page_loads_nothing_from_elsewhere(read, document):
    assert all(target.startswith("#") for target in read.targets)
    assert set(read.targets) <= {f"#{i}" for i in read.ids}
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in read.tags}
    text = page(document)
    assert "@import" not in text and not re.search(r"url\((?!#)", text)


def test_each_figure_is_there_with_its_alternative_text_and_identifiers_are_unique(read):
    figures = [attrs for tag, attrs in read.tags if tag == "svg"]
    assert len(figures) == 2
    assert all(f["role"] == "img" and f["aria-label"] == 'It "falls".' for f in figures)
    assert len(read.ids) == len(set(read.ids)), sorted(i for i in read.ids if read.ids.count(i) > 1)[:5]


def test_text_of_the_user_is_escaped_and_headings_are_in_order(read, document):
    assert "A &lt;report&gt;" in page(document)
    headings = [tag for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1


def test_a_verdict_is_a_word_and_not_only_a_colour(document):
    assert "✗</span> problem" in page(document)
    assert "✗" in to_text(document)


def test_figures_follow_light_and_dark_mode(document):
    svg = to_svg(document.figures()[0])
    assert "var(--second, #0b62b8)" in svg and ">layer<" in svg
    assert "prefers-color-scheme: dark" in page(document)


def test_the_page_is_the_same_each_time(document, tmp_path):
    assert (
        to_html(document, tmp_path / "a.html").read_bytes()
        == to_html(document, tmp_path / "b.html").read_bytes()
    )


def test_drawing_leaves_the_settings_of_matplotlib_alone_and_needs_no_pyplot(document):
    before = dict(matplotlib.rcParams)
    image = to_png(document.figures()[0])
    assert image.startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_terminal_holds_its_width_and_shows_everything(document, width):
    text = to_text(document, width)
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "ordered",
        "0.333",
        "→ remedy",
        "q ▁▂▃",
        "A caveat.",
        "25 of 30 rows",
        "seed 0",
        "A <report>",
    ):
        assert word in " ".join(text.split()), word


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="row 1 of table 'T' has 1 cells"):
        Table("T", ["a", "b"], [[1, 2], [3]])


def test_an_empty_document_can_be_shown(tmp_path):
    assert to_text(Document("Nothing")).strip() == "Nothing"
    assert "Nothing" in page(Document("Nothing"))
