"""The released adapter `./fine_tuned_model/`, which is switched atomically: its history, lineage and publication."""
