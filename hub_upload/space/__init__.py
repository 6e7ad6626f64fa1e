"""Publish the search page of `capivara_search` as a Space (web demo) on the Hub, with a server or as static files."""
