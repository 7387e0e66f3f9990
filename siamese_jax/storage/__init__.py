"""What is kept on disk: written beside and renamed, or append-only; verified when read."""
