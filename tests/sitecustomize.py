"""Read first by each process that a test starts, since conftest.py has put this folder on its path.

What imports make stays: to look for waste among it took a third of their time, and at the end of a process once more.
"""

import atexit
import gc

gc.set_threshold(1_000_000)
atexit.register(gc.freeze)
