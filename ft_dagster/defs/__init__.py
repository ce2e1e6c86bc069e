"""The Dagster shell: a thin module for each asset, and what they share."""
