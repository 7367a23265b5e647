"""``python -m metarobot``: the command line."""

from metarobot.cli.main import main

main()
