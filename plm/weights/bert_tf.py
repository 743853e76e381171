"""Placeholder."""


def recognises(directory) -> bool:
    return False
