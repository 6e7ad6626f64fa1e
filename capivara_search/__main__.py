"""Start the command line `capivara`, which searches the user's own pictures.

Both `python -m capivara_search` and the console script `capivara` run this module.
"""

from capivara_common.interrupt import exit_on_interrupt

# This call precedes the imports below because they take time. Ctrl-C during the imports then prints one line instead of
# a traceback.
exit_on_interrupt()

from capivara_search.command import run  # noqa: E402

if __name__ == "__main__":
    run()
