"""Compare the families of generative models on the same digits, by the same measures."""
