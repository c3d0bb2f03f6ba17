"""Pictures that a command has written."""

from pathlib import Path

from PIL import Image


def description(path: Path) -> str:
    """What the picture says there is to see."""
    with Image.open(path) as picture:
        return str(picture.info["Description"])
