"""The released adapter: `./fine_tuned_model/`, switched atomically, and its history."""
