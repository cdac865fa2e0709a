"""Turn text and records into batches of token ids.

    readers, sources    files and datasets -> records
    pretraining/        text -> token ids in shards on disk -> batches of fixed length
    finetuning/         records -> examples -> batches of padded or packed examples
    tokenizer, sampling what both use

Only the modules that make batches import torch, so that `relora prepare` does not load it.
"""
