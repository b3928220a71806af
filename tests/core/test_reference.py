import pytest

from bolza.core import Reference, cites
from bolza.core.errors import ArgumentError

ARTICLE = Reference(
    "doe2020control",
    "Doe, Jane and Roe, Richard",
    "On control",
    2020,
    venue="Journal of Control",
    doi="10.1/2",
)


def test_a_journal_paper_is_an_article_with_its_doi():
    assert ARTICLE.bibtex() == (
        "@article{doe2020control,\n  author = {Doe, Jane and Roe, Richard},\n  title = {On control},\n"
        "  year = {2020},\n  journal = {Journal of Control},\n  doi = {10.1/2},\n}"
    )


def test_a_preprint_has_its_arxiv_number():
    text = Reference("roe2021x", "Roe, R.", "X", 2021, arxiv="2101.00001").bibtex()
    assert text.startswith("@misc{roe2021x") and "eprint = {2101.00001}" in text and "journal" not in text


def test_one_line_names_one_two_or_many_authors():
    def line(authors, **where):
        return str(Reference("k", authors, "T", 2000, **where))

    assert str(ARTICLE) == "Doe & Roe (2020), On control, Journal of Control"
    assert line("Doe, J.", arxiv="1") == "Doe (2000), T, arXiv:1"
    assert line("Doe, J. and Roe, R. and Poe, E.", doi="10.1") == "Doe et al. (2000), T, 10.1"
    assert line("Doe, J.") == "Doe (2000), T"


def test_cites_marks_functions_and_classes_and_returns_them():
    def method():
        return 1

    class Method:
        pass

    assert cites(ARTICLE)(method) is method and method() == 1
    assert method.__references__ == (ARTICLE,)
    assert cites(ARTICLE, ARTICLE)(Method).__references__ == (ARTICLE, ARTICLE)


def test_a_name_in_another_order_is_refused():
    with pytest.raises(ArgumentError, match="'Jane Doe' of doe2020"):
        Reference("doe2020", "Jane Doe", "On control", 2020)
    assert "{The Group}" in Reference("doe2020", "Doe, Jane and {The Group}", "On control", 2020).bibtex()
