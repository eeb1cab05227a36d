"""The page of what is supported is what the code's tables say."""

import support_page


def test_the_page_is_written_from_the_tables_of_the_code():
    assert support_page.PAGE.read_text(encoding="utf-8") == support_page.page(), "run python tests/support_page.py"
