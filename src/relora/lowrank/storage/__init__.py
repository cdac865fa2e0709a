"""Storage formats of the frozen weights: fp32 or bf16, int8 codes, NF4 codes; with or without an fp32 master copy."""
