"""A dictionary of names that says, when asked for one it does not have, which ones it has."""


class UnknownName(KeyError, ValueError):
    """A name that a registry does not have; both kinds of error, so that either is caught."""

    __str__ = Exception.__str__  # a KeyError would put the message in quotes


class Registry(dict):
    """An ordinary dict, but `registry["typo"]` raises an error that lists the known names. kind: what they name."""

    def __init__(self, kind: str, entries: dict):
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name):
        raise UnknownName(f"{self.kind}: expected one of {', '.join(self)}, got {name!r}")
