"""Every kind of problem says why it matters and what to do; one report raises, the other collects."""

import pytest

from m2f_trainer.data.problems import KINDS, Findings, kind_of, listed, raise_problem
from m2f_trainer.errors import DataError, ImageError, ImageSizeError, MaskError, MissingImageError, printable


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_a_reason_and_a_remedy_in_sentences(name):
    kind = KINDS[name]
    assert kind.title
    assert kind.why.endswith(".")
    assert kind.remedy.endswith(".")
    assert not kind.fix.endswith(".")


def test_errors_come_before_warnings_and_notes_are_last():
    severities = [kind.severity for kind in KINDS.values()]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    report = Findings()
    for name in reversed(KINDS):
        report(name, "file", [1], "message")
    assert [finding.kind for finding in report.sorted()] == list(KINDS)


def test_cases_of_one_kind_and_file_are_one_finding_with_the_first_message():
    report = Findings()
    for number in range(3):
        report("bad-mask", "a.json", [number], f"annotation {number}", image=7)
    report("bad-mask", "b.json", [9], "annotation 9")
    first, second = report.sorted()
    assert (first.ids, first.count, first.message, first.images) == ([0, 1, 2], 3, "annotation 0", [7, 7, 7])
    assert (second.ids, second.count) == ([9], 1)


@pytest.mark.parametrize(("kind", "error"), [("bad-mask", MaskError), ("bad-crowd", DataError)])
def test_the_report_of_training_raises_the_error_of_the_kind(kind, error):
    with pytest.raises(error, match="annotation 3") as raised:
        raise_problem(kind, "a.json", [3], "annotation 3")
    assert type(raised.value) is error


@pytest.mark.parametrize("error", [ImageError, ImageSizeError, MissingImageError])
def test_an_image_error_has_the_kind_that_raises_it(error):
    assert KINDS[kind_of(error("message"))].raises is error


def test_long_lists_and_control_characters_are_cut_from_messages():
    assert listed(range(10)) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert listed(list(range(11))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (11 in all)"
    assert printable("a\x1b[31m雲") == "a?[31m雲"
