"""Learning algorithms, one file each.

Entry points in ``pyproject.toml`` name what each file offers. Called as a function,
``metarobot.agents()`` lists the names.
"""

if __name__ != "metarobot.agents":
    raise ImportError(
        "import metarobot.agents, not agents: under two names every class would exist twice"
    )

from metarobot._callable import make_callable

make_callable(__name__)
