"""``python -m isthmus`` is the program ``isthmus``."""

from isthmus.cli import main

if __name__ == "__main__":
    main()
