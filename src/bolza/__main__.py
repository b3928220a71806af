"""``python -m bolza`` is the ``bolza`` command."""

from bolza.cli import main

if __name__ == "__main__":
    main()
