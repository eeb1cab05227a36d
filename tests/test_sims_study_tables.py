"""Markdown tables and standard errors."""

import html.parser

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sims.data.folders import printable
from sims.study.tables import csv_text, literal, markdown, mean_and_error, standard_error


def test_a_table_has_a_head_a_rule_and_rows():
    assert markdown(["n", "of |x|"], [(2, "a|b"), (3, "")]) == "| n | of \\|x\\| |\n|---|---|\n| 2 | a\\|b |\n| 3 | |"
    assert markdown(["a"], []) == "| a |\n|---|"
    with pytest.raises(ValueError, match="a row has 1 cells under 2 heads"):
        markdown(["a", "b"], [["x"]])


def test_the_standard_error_is_of_the_finite_values():
    values = np.array([1.0, np.nan, 3.0, np.inf, 5.0])
    mean, error = standard_error(values)
    assert mean == 3.0
    np.testing.assert_allclose(error, 2 / np.sqrt(3), rtol=1e-12)
    assert mean_and_error(values) == "3 ± 1"
    assert mean_and_error(np.array([0.12345, np.nan])) == "0.123"
    assert mean_and_error(np.full((2, 2), np.nan)) == "not defined"
    assert mean_and_error(np.array([]), missing="-") == "-"


def test_formulas_are_text_in_csv_and_empty_text_is_empty():
    assert csv_text(["a", "b"], [["=1+1", ""], ["@x", "-1"]]) == "a,b\n'=1+1,\n'@x,-1\n"


class Cells(html.parser.HTMLParser):
    """The text of each cell of a page, and the tags that are there."""

    def __init__(self, page):
        super().__init__()
        self.cells, self.tags, self.inside = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "td":
            self.cells.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside &= tag != "td"

    def handle_data(self, data):
        if self.inside:
            self.cells[-1] += data


@given(st.text(st.sampled_from("ab1 \\`*_{}[]()#+-.!|<>&;~:/'\"\nxé\x1b"), max_size=14))
@example("<b>|x---y`z`\n| q |")
@example("[a](javascript:b)![p](http://e/x.png)<http://e>&lt;&#60;")
@example("\\|\\")
@example("**a** _b_ ~~c~~ a_b_c")
def test_literal_text_is_read_as_it_is(text):
    """In a table, by a reader that knows everything that GitHub marks up, raw HTML too."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = Cells(reader.render(markdown(["n"], [[f"x{literal(text)}x"]])))
    assert page.cells == [f"x{printable(text)}x"]
    assert page.tags == ["table", "thead", "tr", "th", "tbody", "tr", "td"]
