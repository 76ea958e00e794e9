import pytest

from ncprior.groups import check_groups, parse_groups, spell_groups


@pytest.mark.parametrize(
    ("text", "groups"),
    [("0", [0]), ("0-2", [0, 1, 2]), ("0-1,4", [0, 1, 4]), (" 3 , 1", [1, 3]), ("2,2-3", [2, 3])],
)
def test_texts(text, groups):
    assert parse_groups(text) == groups
    assert parse_groups(spell_groups(groups)) == groups


def test_spelling_is_short():
    assert spell_groups([5, 0, 1, 2]) == "0-2,5"


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1--2", "3-1", "1.5", "0;1"])
def test_what_is_none(text):
    with pytest.raises(ValueError, match="groups must look like"):
        parse_groups(text)


@pytest.mark.parametrize("groups", [[], [3], [-1], "2-3"])
def test_range(groups):
    with pytest.raises(ValueError, match="numbers from 0 to 2, at least one"):
        check_groups(groups, 3)
    assert check_groups("0-2", 3) == check_groups([2, 1, 0, 0], 3) == [0, 1, 2]
