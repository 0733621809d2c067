"""The help text of the recipe fields."""

from m2f_trainer.config.field_help import WIDTH, help_of_field, help_of_fields
from m2f_trainer.config.recipe import rows


def test_every_field_appears_in_the_help_once() -> None:
    lines = help_of_fields().splitlines()
    assert sorted(line.split()[0] for line in lines if line.startswith("  --")) == sorted(
        f"--{name}" for name in rows()
    )


def test_the_help_states_values_and_default_in_lines_that_fit() -> None:
    lines = help_of_fields().splitlines()
    assert max(map(len, lines)) <= WIDTH
    (tune,) = [line for line in lines if line.startswith("  --tune ")]
    assert tune.startswith("  --tune frozen|lora|full  ")
    assert help_of_field("learning_rate").endswith("[0.0001]")
    assert help_of_field("learning_rate").startswith("  --learning_rate X|auto  ")
    assert help_of_field("horizontal_flip").startswith("  --horizontal_flip true|false  ")
    assert help_of_field("horizontal_flip").endswith("[true]")
    assert help_of_field("pyramid_taps").startswith("  --pyramid_taps N ...  ")
