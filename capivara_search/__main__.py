"""`python -m capivara_search` and the console script `capivara`."""

from capivara_common.interrupt import exit_on_interrupt

exit_on_interrupt()

from capivara_search.command import run  # noqa: E402

if __name__ == "__main__":
    run()
