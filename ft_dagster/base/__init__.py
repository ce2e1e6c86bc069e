"""The pretrained model: where it comes from, its hashes, its preparation. Imports no torch."""
