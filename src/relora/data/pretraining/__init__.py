"""Prepare text as shards of token ids (corpus, encode, prepare, journal, shards) and read batches from them."""
