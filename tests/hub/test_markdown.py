"""Values in Markdown show as text and do nothing."""

import json

from m2f_trainer.hub.markdown import escape, json_block, without_folders


def test_escaping_keeps_plain_words_and_one_line() -> None:
    assert escape("traffic light") == "traffic light"
    assert escape("a\nb  c") == "a b c"
    assert escape('x"; import os #', code=True) == "x_; import os #"


def test_text_cannot_become_markdown_or_html() -> None:
    assert escape("**a** <b> [c](d) # e") == r"\*\*a\*\* &lt;b&gt; \[c\]\(d\) \# e"


def test_a_json_block_is_the_same_json_and_nothing_in_it_ends_the_block() -> None:
    values = {"name": "```\n<script>alert(1)</script>", "rate": 1e-4, "sides": [1, None]}
    text = json_block(values)
    assert json.loads(text) == values
    assert not set("`<>(") & set(text)


def test_absolute_paths_at_any_depth_are_cut_to_their_last_part() -> None:
    values = {"data": "/home/someone/pets", "hub": "me/pets", "deep": [{"a": "/x/y"}, ["/z"], 3]}
    assert without_folders(values) == {"data": "pets", "hub": "me/pets", "deep": [{"a": "y"}, ["z"], 3]}
