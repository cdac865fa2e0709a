"""Export of a checkpoint as a Hugging Face model folder, and of a model as a GGUF file."""
