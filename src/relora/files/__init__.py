"""Files: written as a whole or not at all, and read safely if somebody else may have made them."""
