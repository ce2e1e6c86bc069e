"""What is held out for evaluation: the choice, its record, and how much of it the train side contains."""
