"""Score a trained model: perplexity of text, answers to instructions, lm-eval tasks, classes; and their metrics."""
