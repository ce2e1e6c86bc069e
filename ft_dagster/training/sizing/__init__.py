"""What a training takes: operations, memory, time, and whether it fits. Imports torch only to look at a GPU."""
