"""Search your own pictures by a sentence: an index that grows, the command `capivara`, and its page."""
