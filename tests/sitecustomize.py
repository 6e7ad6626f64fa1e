"""Speed up the processes that tests start. Python imports this module first, because conftest.py sets PYTHONPATH.

Garbage collection would take a third of the time of imports, and again at the end of the process, for objects that
stay in memory anyway.
"""

import atexit
import gc

gc.set_threshold(1_000_000)
atexit.register(gc.freeze)
