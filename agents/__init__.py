"""Learning algorithms, one file each; importing a file registers what it defines."""

if __name__ != "metarobot.agents":
    raise ImportError("import metarobot.agents, not agents: under two names every class would exist twice")
