"""The evaluation of an adapter: bits per byte on held-out chapters, samples, and the verdict on its release."""
