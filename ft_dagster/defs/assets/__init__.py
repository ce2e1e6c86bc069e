"""The assets of the graph, one module each, and their shared code."""
