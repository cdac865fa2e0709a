"""Open a trained model, run or adapter, and generate text with it: prompts continued, or a chat."""
