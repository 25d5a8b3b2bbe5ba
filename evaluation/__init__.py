"""From a fine-tuned model to metrics, predictions and leaderboard files."""
