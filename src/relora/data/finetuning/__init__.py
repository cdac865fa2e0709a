"""From records to examples and batches of them: layouts, templates, encoding, packing, classification."""
