"""Objects of a row are the same in both spellings; what is neither is refused."""

import pytest

from m2f_trainer.data.objects import category_of, split_objects
from m2f_trainer.errors import DataError


def test_lists_of_objects_and_objects_of_lists_are_the_same():
    objects = [{"id": 1, "label": 3}, {"id": 2, "label": 4}]
    assert split_objects(objects, "row 1") == objects
    assert split_objects({"id": [1, 2], "label": [3, 4], "note": "x"}, "row 1") == objects
    assert split_objects({}, "row 1") == []


@pytest.mark.parametrize("objects", [None, 3, "text", {"id": [1, 2], "label": [3]}])
def test_anything_else_is_refused(objects):
    with pytest.raises(DataError, match="row 1: expected"):
        split_objects(objects, "row 1")


def test_the_category_is_name_and_number_under_any_of_its_fields():
    assert category_of({"label": 3}) == (None, 3)
    assert category_of({"category": 3, "class": "cell"}) == ("cell", 3)
    assert category_of({"category": 3, "class": "cell"}, ["category"]) == (None, 3)
    assert category_of({"category": 2**70, "label": " "}) == (None, None)
    assert category_of({"category": True, "id": 7}) == (None, None)
