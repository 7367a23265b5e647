"""Learning algorithms, one file each; entry points in ``pyproject.toml`` name what each one
offers.
"""

if __name__ != "metarobot.agents":
    raise ImportError(
        "import metarobot.agents, not agents: under two names every class would exist twice"
    )
