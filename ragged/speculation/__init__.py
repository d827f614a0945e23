"""Tree speculation on a real language model, where verifying many trees of guesses is one ragged batch."""
