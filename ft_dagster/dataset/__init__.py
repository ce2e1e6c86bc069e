"""Sections -> documents -> packed blocks of tokens, train and held out, without losing one."""
