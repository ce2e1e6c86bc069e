"""The model in memory: base and adapter, the packed forward pass, the loss, and the adapter's manifest."""
