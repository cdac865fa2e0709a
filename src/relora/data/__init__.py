"""From raw text to batches, in the order in which text walks: sources, tokenizer, encode, shards, batches.

Only what makes batches needs torch: the processes that tokenize never load it.
"""
