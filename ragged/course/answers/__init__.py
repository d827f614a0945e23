"""What the exercises ask, and how an answer is tried: a file for each lesson. Reading them spoils the exercises."""
