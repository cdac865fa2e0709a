"""Writing files and folders so that they are whole or absent; reading files that other people made."""
