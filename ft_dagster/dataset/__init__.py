"""Turning sections into documents and packed rows of tokens, train and held out, without losing a token."""
