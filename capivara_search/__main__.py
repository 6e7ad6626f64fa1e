"""Entry point of `python -m capivara_search` and of the console script `capivara`."""

from capivara_common.interrupt import exit_on_interrupt

# Before the imports below, which take time: Ctrl-C during them prints one line instead of a traceback.
exit_on_interrupt()

from capivara_search.command import run  # noqa: E402

if __name__ == "__main__":
    run()
