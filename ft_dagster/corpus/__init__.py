"""Report files -> chapters -> sections: reading, cleaning, merging, and accounting for every byte."""
