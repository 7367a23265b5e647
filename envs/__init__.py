"""Task families, one file each; entry points in ``pyproject.toml`` name what each one offers."""

if __name__ != "metarobot.envs":
    raise ImportError(
        "import metarobot.envs, not envs: under two names every class would exist twice"
    )
