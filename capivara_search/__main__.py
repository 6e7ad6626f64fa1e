"""`python -m capivara_search` and the console script `capivara`."""

from capivara_common.start import start_command

start_command()  # nothing else imports this module: Ctrl-C ends the imports that follow in one line

from capivara_search.command import run  # noqa: E402

if __name__ == "__main__":
    run()
