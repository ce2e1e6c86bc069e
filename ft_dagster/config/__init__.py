"""What to train and where everything is: recipes, settings, and the secrets among them."""
