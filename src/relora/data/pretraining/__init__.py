"""From raw text to token files and batches of them: sources, encoding, shards, sampling."""
