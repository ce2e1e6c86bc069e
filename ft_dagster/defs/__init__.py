"""The Dagster layer: a thin module for each asset, and the code that they share."""
