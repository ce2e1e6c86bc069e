"""Base and adapter in memory: the packed forward pass, the loss, and what an adapter says of its making."""
