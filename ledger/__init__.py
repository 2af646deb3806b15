"""What is true: the events, the rules that make them, and the store that keeps them."""
