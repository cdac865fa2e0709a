"""How a frozen weight is kept: plain, with an fp32 master, as int8 codes, or as NF4."""
