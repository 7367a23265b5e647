"""Pictures and videos of simulated worlds.

Called as a function, ``metarobot.render(run, out)`` films an agent.
"""

from metarobot._callable import make_callable

make_callable(__name__)
