"""What the tests of answers to exercises share."""

from ragged import course


def said(capsys, name, yours):
    """(whether it is right, what the check prints) of an answer to the exercise of that name."""
    good = course.check(name, yours)
    return good, capsys.readouterr().out
