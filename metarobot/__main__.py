"""``python -m metarobot``: the command line."""

from metarobot.cli.main import main

if __name__ == "__main__":
    main()
