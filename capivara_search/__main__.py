"""`python -m capivara_search` and the console script `capivara`."""

from capivara_common.interrupt import stop_while_importing

stop_while_importing()

from capivara_search.command import run  # noqa: E402

if __name__ == "__main__":
    run()
