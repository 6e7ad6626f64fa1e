"""The page of `capivara_search` as a Space of the Hub."""
