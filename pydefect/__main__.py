"""``python -m pydefect``, the same as ``pydefect``."""

from pydefect.cli import main

if __name__ == "__main__":
    main()
