"""A dictionary of names that says, when asked for one it does not have, which ones it has."""


class Registry(dict):
    """An ordinary dict, but `registry["typo"]` raises a KeyError that lists the known names. kind: what they name."""

    def __init__(self, kind: str, entries: dict):
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name):
        raise KeyError(f"{self.kind}: expected one of {', '.join(self)}, got {name!r}")
