"""How a setting says that it may differ between two runs of the same run directory."""

from dataclasses import field

VOLATILE = {"volatile": True}


def volatile(default: object) -> object:
    """A field that may differ between two runs of the same run directory: it changes speed, not results."""
    return field(default=default, metadata=VOLATILE)
