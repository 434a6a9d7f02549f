"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["VERSION"]

try:
    VERSION = version("pydefect-vision")
except PackageNotFoundError as error:
    raise ImportError(
        "pydefect is not installed for this Python: install it from its source folder, `pip install .`, and "
        "run Python in another one"
    ) from error
