"""Markdown tables and standard errors."""

import numpy as np
import pytest

from sims.study.tables import csv_text, markdown, mean_and_error, standard_error


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
