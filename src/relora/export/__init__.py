"""A checkpoint as a Hugging Face model folder, or a model as a GGUF file."""
