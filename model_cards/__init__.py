"""Model cards, one for each checkpoint, and their way onto the Hub."""
