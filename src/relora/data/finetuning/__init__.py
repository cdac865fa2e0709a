"""Turn records into examples and batches of them: for instructions (layouts, templates, packing) and classification."""
