"""Task families, one file each; importing a file registers what it defines."""

if __name__ != "metarobot.envs":
    raise ImportError("import metarobot.envs, not envs: under two names every class would exist twice")
