"""Messages on one and on several processes, and the argument type of counts."""

import argparse

import pytest

from m2f_trainer.cli.console import positive_int, say, suggest


def test_only_the_main_process_prints_but_every_process_prints_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "3"):
        monkeypatch.setenv("RANK", rank)
        say("progress")
        say("broken", stream="error")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("progress\n", "broken\n[rank 3] broken\n")


def test_next_steps_are_listed_below_a_blank_line(capsys: pytest.CaptureFixture[str]) -> None:
    suggest("m2f a", "m2f b")
    assert capsys.readouterr().out == "\nNext:\n  m2f a\n  m2f b\n"


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "\u00b2"])
def test_a_count_is_a_whole_number_of_at_least_one(text: str) -> None:
    assert positive_int("12") == 12
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of at least 1, got"):
        positive_int(text)
